"""A family of your own, in a file of your own: OPT, which moecc does not have.

    moecc inspect FOLDER --load examples/my_family.py
    moecc convert FOLDER OUT -p 'upcycle{experts=8}' --to st_moe --load examples/my_family.py

Its test is ``tests/examples/test_my_family.py``; the parts are explained in
``docs/adding-a-family.md``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from moecc.families.blocks import Blocks
from moecc.families.building import GraphRequest
from moecc.families.configs.encdec import read_activation
from moecc.families.configs.model import ModelConfig, activation_problem
from moecc.families.configs.reader import KeyProblem, Reader, key_problem
from moecc.families.names import TensorNames
from moecc.families.outside import Family
from moecc.families.parameters import Parameters, float32_of
from moecc.ir import I32, Builder, Graph, Value, tensor

SIZES = (
    "hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip
NAMES = TensorNames(embedding="model.decoder.embed_tokens.weight")
FIRST_POSITION = 2
"""The row of the table of positions that the first token has."""


@dataclass(frozen=True, kw_only=True)
class OptConfig(ModelConfig):
    """An OPT whose norms come first, with biases, and with the embedding as its head."""

    model_type: ClassVar[str] = "opt"
    architecture: ClassVar[str] = "OPTForCausalLM"
    kind: ClassVar[str] = "a decoder with layer norms"
    defaults: ClassVar[Mapping[str, object]] = {
        "vocab_size": 50_272,
        "hidden_size": 768,
        "ffn_dim": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 2048,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "tie_word_embeddings": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "word_embed_proj_dim": None,
        "initializer_range": 0.02,
    }

    hidden_size: int
    ffn_dim: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    activation_function: str = "relu"
    tie_word_embeddings: ClassVar[bool] = True

    @property
    def heads(self) -> tuple[int, int]:
        """The number of heads, and their width."""
        return self.num_attention_heads, self.hidden_size // self.num_attention_heads

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, object]:
        for key in (
            "do_layer_norm_before", "tie_word_embeddings", "enable_bias",
            "layer_norm_elementwise_affine",
        ):  # fmt: skip
            if not reader.flag(key):
                reader.refuse(key, "this kind of OPT is not supported", expected="true")
        values = {name: reader.size(name) for name in SIZES}
        if reader.value("word_embed_proj_dim") not in (None, values["hidden_size"]):
            what = "embeddings of another width than the model's are not supported"
            expected = f"{values['hidden_size']}"
            reader.refuse("word_embed_proj_dim", what, expected=expected)
        act = read_activation(reader, "activation_function")
        return {**super()._read(reader), **values, "activation_function": act}

    def _write(self) -> dict[str, object]:
        names = (*SIZES, "activation_function", "tie_word_embeddings")
        fixed = {"do_layer_norm_before": True, "word_embed_proj_dim": self.hidden_size}
        return {**{name: getattr(self, name) for name in names}, **fixed}

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values."""
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            keys = ("hidden_size", "num_attention_heads")
            found = f"{self.hidden_size} and {self.num_attention_heads}"
            yield key_problem("the heads do not divide the width", None, found, *keys)
        yield from activation_problem(self.activation_function, "activation_function")
        yield from super().checks()


def build_opt(config: OptConfig, request: GraphRequest) -> Graph:
    """Return the graph from ``tokens : i32[batch, seq]`` to ``logits : f32[batch, seq, vocab]``."""
    attrs = {"family": "opt", "config": config.to_json(), "checkpoint": request.checkpoint}
    graph = Graph("opt", attrs)
    blocks = Blocks(Builder(graph), Parameters(graph, NAMES, request.dtype_of or float32_of), 1e-5)
    builder, width = blocks.builder, config.hidden_size
    tokens = graph.input("tokens", tensor(I32, batch=request.batch, seq=request.seq))
    with builder.at("embed"):
        words = blocks.params.plain(NAMES.embedding, "embed", vocab=config.vocab_size, embed=width)
        hidden = builder.embedding(words, tokens, axis="vocab", name="hidden")
        positions = builder.positions(tokens, axis="seq", name="positions")
        count = config.max_position_embeddings + FIRST_POSITION
        name = "model.decoder.embed_positions.weight"
        table = blocks.params.plain(name, "embed", position=count, embed=width)
        table = builder.slice(table, axis="position", start=FIRST_POSITION, stop=count)
        hidden = builder.add(hidden, builder.embedding(table, positions, axis="position"))
        seen = builder.causal(positions, blocks.as_keys(positions), name="causal")
    for layer in range(config.num_hidden_layers):
        hidden = _layer(blocks, config, hidden, layer, seen)
    with builder.at("norm"):
        hidden = blocks.norm(hidden, "model.decoder.final_layer_norm")
    with builder.at("head"):
        graph.set_output("logits", builder.contract(hidden, words, over="embed", name="logits"))
    return graph


def _layer(blocks: Blocks, config: OptConfig, hidden: Value, layer: int, seen: Value) -> Value:
    builder, prefix = blocks.builder, f"model.decoder.layers.{layer}."
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
        made = blocks.two_layers(x, up, down, config.activation_function, config.ffn_dim)
        return builder.add(hidden, made, name="hidden")


OPT = Family(OptConfig, build_opt, NAMES)
