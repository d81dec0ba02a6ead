"""A family of your own, in a file of your own: BioGPT, which moecc does not have.

    moecc inspect FOLDER --load examples/my_family.py
    moecc convert FOLDER OUT -p 'upcycle{experts=8}' --to st_moe --load examples/my_family.py

Its test is ``tests/examples/test_my_family.py``; the parts are explained in
``docs/adding-a-family.md``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from moecc.families.building import GraphRequest
from moecc.families.config import ModelConfig, activation_problem
from moecc.families.encdec import read_activation
from moecc.families.graphs.blocks import Blocks
from moecc.families.graphs.parameters import Parameters, float32_of
from moecc.families.names import TensorNames
from moecc.families.outside import Family
from moecc.families.reader import KeyProblem, Reader, key_problem
from moecc.ir import I32, Builder, Graph, Value, tensor

SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip
NAMES = TensorNames(embedding="biogpt.embed_tokens.weight", head="output_projection.weight")
FIRST_POSITION = 2
"""The row of the table of positions that the first token has."""
EPS = 1e-5
"""Of the norms; transformers has a key for it in the config, and does not read it."""


@dataclass(frozen=True, kw_only=True)
class BioGptConfig(ModelConfig):
    """A BioGPT: norms first, biases, learned positions, and the embedding as its head."""

    model_type: ClassVar[str] = "biogpt"
    architecture: ClassVar[str] = "BioGptForCausalLM"
    kind: ClassVar[str] = "a decoder with layer norms"
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

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    hidden_act: str = "gelu"
    scale_embedding: bool = True
    tie_word_embeddings: ClassVar[bool] = True

    @property
    def heads(self) -> tuple[int, int]:
        """The number of heads, and their width."""
        return self.num_attention_heads, self.hidden_size // self.num_attention_heads

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, object]:
        if not reader.flag("tie_word_embeddings"):
            what = "a BioGPT with an output matrix of its own is not supported"
            reader.refuse("tie_word_embeddings", what, expected="true")
        reader.value("layer_norm_eps")  # every key has to be read; see EPS
        return {
            **super()._read(reader),
            **{name: reader.size(name) for name in SIZES},
            "hidden_act": read_activation(reader, "hidden_act"),
            "scale_embedding": reader.flag("scale_embedding"),
        }

    def _write(self) -> dict[str, object]:
        names = (*SIZES, "hidden_act", "scale_embedding", "tie_word_embeddings")
        return {name: getattr(self, name) for name in names}

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values."""
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            keys = ("hidden_size", "num_attention_heads")
            found = f"{self.hidden_size} and {self.num_attention_heads}"
            yield key_problem("the heads do not divide the width", None, found, *keys)
        yield from activation_problem(self.hidden_act)
        yield from super().checks()


def build_biogpt(config: BioGptConfig, request: GraphRequest) -> Graph:
    """Return the graph from ``tokens : i32[batch, seq]`` to ``logits : f32[batch, seq, vocab]``."""
    attrs = {"family": "biogpt", "config": config.to_json(), "checkpoint": request.checkpoint}
    graph = Graph("biogpt", attrs)
    blocks = Blocks(Builder(graph), Parameters(graph, NAMES, request.dtype_of or float32_of), EPS)
    builder, width = blocks.builder, config.hidden_size
    tokens = graph.input("tokens", tensor(I32, batch=request.batch, seq=request.seq))
    with builder.at("embed"):
        words = blocks.params.plain(NAMES.embedding, "embed", vocab=config.vocab_size, embed=width)
        hidden = builder.embedding(words, tokens, axis="vocab", name="hidden")
        if config.scale_embedding:
            hidden = builder.scale(hidden, by=width**0.5)
        positions = builder.positions(tokens, axis="seq", name="positions")
        count = config.max_position_embeddings + FIRST_POSITION
        name = "biogpt.embed_positions.weight"
        table = blocks.params.plain(name, "embed", position=count, embed=width)
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


BIOGPT = Family(BioGptConfig, build_biogpt, NAMES)
