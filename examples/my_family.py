"""A family of your own, in a file of your own: BioGPT, which moecc does not have.

    moecc inspect FOLDER --load examples/my_family.py
    moecc convert FOLDER OUT -p 'upcycle{experts=8}' --to st_moe --load examples/my_family.py

Its test is ``tests/examples/test_my_family.py``; the parts are explained in
``docs/adding-a-family.md``.
"""

from collections.abc import Iterator, Mapping
from typing import ClassVar

from moecc.families.config import (
    ModelConfig,
    Only,
    TensorNames,
    activation,
    config_class,
    flag,
    size,
)
from moecc.families.graphs.blocks import Blocks
from moecc.families.graphs.parameters import GraphRequest, Parameters
from moecc.families.reader import COUNT, LAYERS, LENGTH, NEURONS, WIDTH, KeyProblem
from moecc.families.registry import Family
from moecc.ir import I32, Graph, Value, tensor

FIRST_POSITION = 2
"""The row of the table of positions that the first token has."""


@config_class
class BioGptConfig(ModelConfig):
    """A BioGPT: norms first, biases, learned positions, and the embedding as its head."""

    model_type: ClassVar[str] = "biogpt"
    architecture: ClassVar[str] = "BioGptForCausalLM"
    kind: ClassVar[str] = "a decoder with layer norms"
    names: ClassVar[TensorNames] = TensorNames(
        embedding="biogpt.embed_tokens.weight", head="output_projection.weight"
    )
    defaults: ClassVar[Mapping[str, object]] = {
        "vocab_size": 42_384,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 1024,
        "hidden_act": "gelu",
        "scale_embedding": True,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
    }
    only: ClassVar[Only] = {
        "tie_word_embeddings": (True, "an output matrix of its own is not supported")
    }
    always: ClassVar[Mapping[str, object]] = {"tie_word_embeddings": True}
    idle: ClassVar[tuple[str, ...]] = ("layer_norm_eps",)  # read by the property

    hidden_size: int = size(WIDTH)
    intermediate_size: int = size(NEURONS)
    num_hidden_layers: int = size(LAYERS)
    num_attention_heads: int = size(COUNT)
    max_position_embeddings: int = size(LENGTH)
    hidden_act: str = activation(default="gelu")
    scale_embedding: bool = flag(default=True)
    tie_word_embeddings: ClassVar[bool] = True

    @property
    def layer_norm_eps(self) -> float:
        """The epsilon of the norms; transformers has a key for it, and does not read it."""
        return 1e-5

    @property
    def heads(self) -> tuple[int, int]:
        """The number of heads, and their width."""
        return self.num_attention_heads, self.hidden_size // self.num_attention_heads

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values."""
        yield from super().checks()
        yield from self.head_checks("hidden_size", "num_attention_heads")


def build_biogpt(config: BioGptConfig, request: GraphRequest) -> Graph:
    """Return the graph from ``tokens : i32[batch, seq]`` to ``logits : f32[batch, seq, vocab]``."""
    params = Parameters.of(config, request)
    graph, width = params.graph, config.hidden_size
    blocks = Blocks(params, config)
    builder = blocks.builder
    tokens = graph.input("tokens", tensor(I32, batch=request.batch, seq=request.seq))
    with builder.at("embed"):
        words = params.plain(config.names.embedding, "embed", vocab=config.vocab_size, embed=width)
        hidden = builder.embedding(words, tokens, axis="vocab", name="hidden")
        if config.scale_embedding:
            hidden = builder.scale(hidden, by=width**0.5)
        positions = builder.positions(tokens, axis="seq", name="positions")
        count = config.max_position_embeddings + FIRST_POSITION
        name = "biogpt.embed_positions.weight"
        table = params.plain(name, "embed", position=count, embed=width)
        table = builder.slice(table, axis="position", start=FIRST_POSITION, stop=count)
        hidden = builder.add(hidden, builder.embedding(table, positions, axis="position"))
        seen = builder.causal(positions, blocks.as_keys(positions), name="causal")
    for layer in range(config.num_hidden_layers):
        hidden = _layer(blocks, config, hidden, layer, seen)
    with builder.at("norm"):
        hidden = blocks.norm(hidden, "biogpt.layer_norm")
    with builder.at("head"):
        graph.set_output("logits", builder.contract(hidden, words, over="embed", name="logits"))
    return graph


def _layer(blocks: Blocks, config: BioGptConfig, hidden: Value, layer: int, seen: Value) -> Value:
    builder, prefix = blocks.builder, f"biogpt.layers.{layer}."
    with builder.at(f"layers.{layer}.attention"):
        x = blocks.norm(hidden, f"{prefix}self_attn_layer_norm")
        names = {axis: f"{prefix}self_attn.{axis}_proj" for axis in ("q", "k", "v", "out")}
        query = blocks.heads(x, names["q"], config.heads, "q")
        key, value = (
            blocks.as_keys(blocks.heads(x, names[n], config.heads, "kv")) for n in ("k", "v")
        )
        mixed = blocks.attend(query, key, value, config.heads[1] ** -0.5, masks=(seen,))
        found = blocks.linear(mixed, names["out"], ("embed", config.hidden_size), "q")
        hidden = builder.add(hidden, found, name="hidden")
    with builder.at(f"layers.{layer}.ffn"):
        x = blocks.norm(hidden, f"{prefix}final_layer_norm")
        up, down = f"{prefix}fc1", f"{prefix}fc2"
        made = blocks.two_layers(x, up, down, config.hidden_act, config.intermediate_size)
        return builder.add(hidden, made, name="hidden")


BIOGPT = Family(BioGptConfig, build_biogpt)
