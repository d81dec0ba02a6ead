"""The graph of a BERT encoder: learned positions, norms after the sums, biases everywhere."""

from __future__ import annotations

from dataclasses import dataclass

from moecc.families.configs import BertConfig
from moecc.families.encdec import as_keys
from moecc.families.feedforward import ACTIVATION_OPS
from moecc.families.names import names_of
from moecc.families.parameters import DtypeOf, Parameters, float32_of
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Value
from moecc.types.dtypes import I32, PRED
from moecc.types.tensor import Size, tensor


def build_bert(
    config: BertConfig,
    dtype_of: DtypeOf | None = None,
    checkpoint: str = "",
    *,
    batch: Size = "B",
    seq: Size = "S",
    padding: bool = False,
) -> Graph:
    """Return the graph from ``tokens : i32[batch, seq]`` to ``hidden : f32[batch, seq, embed]``.

    All tokens are of type 0, as in a single text; the pooler is not part of the graph.  With
    `padding` there is an input ``mask : pred[batch, seq]``, true where a token is one.

    Args:
      config: the config.
      dtype_of: the element type of each tensor on disk; float32 by default.
      checkpoint: the path of the weights, for the graph's attributes.
      batch: the size of the batch axis.
      seq: the size of the sequence axis, up to `max_position_embeddings`.
      padding: whether sequences are padded.
    """
    attrs = {"family": config.model_type, "config": config.to_json(), "checkpoint": checkpoint}
    graph = Graph(config.model_type, attrs)
    params = Parameters(graph, names_of(config.model_type), dtype_of or float32_of)
    tokens = graph.input("tokens", tensor(I32, batch=batch, seq=seq))
    mask = graph.input("mask", tensor(PRED, batch=batch, seq=seq)) if padding else None
    encoder = _Encoder(Builder(graph), config, params)
    keep = None
    with encoder.builder.at("embed"):
        if mask is not None:
            keep = as_keys(encoder.builder, mask)
        hidden = encoder.embed(tokens)
    for layer in range(config.num_hidden_layers):
        hidden = encoder.layer(hidden, layer, keep)
    graph.set_output("hidden", hidden)
    return graph


@dataclass
class _Encoder:
    """The parts of the encoder."""

    builder: Builder
    config: BertConfig
    params: Parameters

    def embed(self, tokens: Value) -> Value:
        """Emit words + positions + the type 0, normalised, ``[batch, seq, embed]``."""
        builder, config = self.builder, self.config
        words = self._table("word", "vocab", config.vocab_size)
        hidden = builder.embedding(words, tokens, axis="vocab", name="words")
        first = builder.constant(value=0.0, dtype="i32")
        types = self._table("token_type", "type", config.type_vocab_size)
        hidden = builder.add(hidden, builder.embedding(types, first, axis="type", name="type"))
        table = self._table("position", "position", config.max_position_embeddings)
        positions = builder.positions(tokens, axis="seq", name="positions")
        hidden = builder.add(hidden, builder.embedding(table, positions, axis="position"))
        return self._norm(hidden, "embeddings.")

    def _table(self, word: str, axis: str, size: int) -> Value:
        name = f"embeddings.{word}_embeddings.weight"
        axes = {axis: size, "embed": self.config.hidden_size}
        return self.params.plain(name, self.builder.loc, **axes)

    def layer(self, hidden: Value, layer: int, keep: Value | None) -> Value:
        """Emit one layer: each sublayer's result is added, and then the sum normalised."""
        prefix = f"encoder.layer.{layer}."
        with self.builder.at(f"layers.{layer}.attention"):
            found = self._attention(hidden, prefix, keep)
            hidden = self._norm(self.builder.add(found, hidden), f"{prefix}attention.output.")
        with self.builder.at(f"layers.{layer}.ffn"):
            found = self._ffn(hidden, prefix)
            return self._norm(self.builder.add(found, hidden), f"{prefix}output.")

    def _attention(self, x: Value, prefix: str, keep: Value | None) -> Value:
        builder, config = self.builder, self.config
        query = self._heads(x, f"{prefix}attention.self.query", "q")
        keys = as_keys(builder, x)
        key = self._heads(keys, f"{prefix}attention.self.key", "kv")
        value = self._heads(keys, f"{prefix}attention.self.value", "kv")
        scores = builder.contract(query, key, over="head_dim", name="scores")
        scores = builder.scale(scores, by=config.head_dim**-0.5)
        if keep is not None:
            scores = builder.mask(scores, keep)
        weights = builder.softmax(scores, axis="kv_seq", name="weights")
        mixed = builder.contract(weights, value, over="kv_seq", name="mixed")
        merged = builder.merge(mixed, axes=("head", "head_dim"), into="q")
        embed = {"embed": config.hidden_size}
        return self._linear(merged, f"{prefix}attention.output.dense", embed, "q")

    def _heads(self, x: Value, name: str, axis: str) -> Value:
        config = self.config
        y = self._linear(x, name, {axis: config.hidden_size}, "embed")
        into = (("head", config.num_attention_heads), ("head_dim", config.head_dim))
        return self.builder.split(y, axis=axis, into=into)

    def _ffn(self, x: Value, prefix: str) -> Value:
        mlp = {"mlp": self.config.intermediate_size}
        inner = self._linear(x, f"{prefix}intermediate.dense", mlp, "embed")
        inner = self.builder.node(ACTIVATION_OPS[self.config.hidden_act], inner).result
        embed = {"embed": self.config.hidden_size}
        return self._linear(inner, f"{prefix}output.dense", embed, "mlp")

    def _linear(self, x: Value, name: str, to: dict[str, int], over: str) -> Value:
        """Emit a product over the axis `over` and a bias."""
        size = x.type[over].size
        assert isinstance(size, int), "the width of a model is known"
        weight = self.params.plain(f"{name}.weight", self.builder.loc, **to, **{over: size})
        bias = self.params.plain(f"{name}.bias", self.builder.loc, **to)
        return self.builder.add(self.builder.contract(x, weight, over=over), bias)

    def _norm(self, x: Value, prefix: str) -> Value:
        embed, loc = self.config.hidden_size, self.builder.loc
        scale = self.params.plain(f"{prefix}LayerNorm.weight", loc, embed=embed)
        bias = self.params.plain(f"{prefix}LayerNorm.bias", loc, embed=embed)
        eps = self.config.layer_norm_eps
        return self.builder.layer_norm(x, scale, bias, axis="embed", eps=eps, name="norm")
