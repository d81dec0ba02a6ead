"""The graph of a BERT encoder: learned positions, norms after the sums, biases everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moecc.families.bert import BertConfig
from moecc.families.graphs.blocks import Blocks
from moecc.families.graphs.parameters import DtypeOf, Parameters, float32_of
from moecc.families.names import names_of
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Value
from moecc.types import I32, PRED, Size, tensor


@dataclass(frozen=True)
class BertNames:
    """The names of a layer's tensors; the tables have the same names in each family.

    Attributes:
      query, key, value, output: the projections of attention.
      norm: the norm of the sum with it.
      layers: where the layers are.
      up, down: the matrices of the feed-forward block.
      ffn_norm: the norm of the sum with it.
    """

    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    output: str = "attention.output.dense"
    norm: str = "attention.output.LayerNorm"
    layers: str = "encoder.layer"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    ffn_norm: str = "output.LayerNorm"


BERT_NAMES: Mapping[str, BertNames] = {
    "mpnet": BertNames(
        "attention.attn.q",
        "attention.attn.k",
        "attention.attn.v",
        "attention.attn.o",
        "attention.LayerNorm",
    ),
    "distilbert": BertNames(
        "attention.q_lin",
        "attention.k_lin",
        "attention.v_lin",
        "attention.out_lin",
        "sa_layer_norm",
        "transformer.layer",
        "ffn.lin1",
        "ffn.lin2",
        "output_layer_norm",
    ),
}
"""By family; one that is not listed has the default names."""

BIAS_TABLE = "encoder.relative_attention_bias.weight"
FURTHEST = 128
"""The distance from which on all of mpnet's distances share one bucket."""


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
    `padding` there is an input ``mask : pred[batch, seq]``, true where a token is one; padding is
    behind the text.

    Args:
      config: the config.
      dtype_of: the element type of each tensor on disk; float32 by default.
      checkpoint: the path of the weights, for the graph's attributes.
      batch: the size of the batch axis.
      seq: the size of the sequence axis, up to the number of positions.
      padding: whether sequences are padded.
    """
    attrs = {"family": config.model_type, "config": config.to_json(), "checkpoint": checkpoint}
    graph = Graph(config.model_type, attrs)
    params = Parameters(graph, names_of(config.model_type), dtype_of or float32_of)
    tokens = graph.input("tokens", tensor(I32, batch=batch, seq=seq))
    mask = graph.input("mask", tensor(PRED, batch=batch, seq=seq)) if padding else None
    names = BERT_NAMES.get(config.model_type, BertNames())
    blocks = Blocks(Builder(graph), params, config.layer_norm_eps)
    encoder = _Encoder(blocks, config, names)
    keep = None
    with encoder.builder.at("embed"):
        if mask is not None:
            keep = blocks.as_keys(mask)
        hidden = encoder.embed(tokens)
        bias = encoder.bias(tokens)
    for layer in range(config.num_hidden_layers):
        hidden = encoder.layer(hidden, layer, bias, keep)
    graph.set_output("hidden", hidden)
    return graph


@dataclass
class _Encoder:
    """The parts of the encoder."""

    blocks: Blocks
    config: BertConfig
    names: BertNames

    @property
    def builder(self) -> Builder:
        return self.blocks.builder

    def embed(self, tokens: Value) -> Value:
        """Emit words + positions + the type 0, normalised, ``[batch, seq, embed]``."""
        builder, config = self.builder, self.config
        words = self._table("word", "vocab", config.vocab_size)
        hidden = builder.embedding(words, tokens, axis="vocab", name="words")
        if config.has_types:
            first = builder.constant(value=0.0, dtype="i32")
            types = self._table("token_type", "type", config.type_vocab_size)
            hidden = builder.add(hidden, builder.embedding(types, first, axis="type", name="type"))
        table = self._positions()
        positions = builder.positions(tokens, axis="seq", name="positions")
        hidden = builder.add(hidden, builder.embedding(table, positions, axis="position"))
        return self.blocks.norm(hidden, "embeddings.LayerNorm")

    def _positions(self) -> Value:
        """Emit the table of positions from that of the first token on."""
        count, first = self.config.max_position_embeddings, self.config.position_offset
        table = self._table("position", "position", count)
        if not first:
            return table
        return self.builder.slice(table, axis="position", start=first, stop=count)

    def bias(self, tokens: Value) -> Value | None:
        """Emit the biases of the scores by distance, ``[seq, kv_seq, head]``, if there are any."""
        count, builder = self.config.relative_buckets, self.builder
        if not count:
            return None
        query = builder.positions(tokens, axis="seq", name="positions")
        key = self.blocks.as_keys(query)
        buckets = builder.relative_buckets(
            query, key, bidirectional=True, buckets=count, max_distance=FURTHEST
        )
        axes = {"bucket": count, "head": self.config.num_attention_heads}
        table = self.blocks.params.plain(BIAS_TABLE, builder.loc, **axes)
        return builder.embedding(table, buckets, axis="bucket", name="bias")

    def _table(self, word: str, axis: str, size: int) -> Value:
        name = f"embeddings.{word}_embeddings.weight"
        axes = {axis: size, "embed": self.config.hidden_size}
        return self.blocks.params.plain(name, self.builder.loc, **axes)

    def layer(self, hidden: Value, layer: int, bias: Value | None, keep: Value | None) -> Value:
        """Emit one layer: each sublayer's result is added, and then the sum normalised."""
        names, config = self.names, self.config
        prefix = f"{names.layers}.{layer}."
        with self.builder.at(f"layers.{layer}.attention"):
            found = self._attention(hidden, prefix, bias, keep)
            hidden = self.builder.add(found, hidden)
            hidden = self.blocks.norm(hidden, f"{prefix}{names.norm}")
        with self.builder.at(f"layers.{layer}.ffn"):
            up, down = f"{prefix}{names.up}", f"{prefix}{names.down}"
            width = config.intermediate_size
            found = self.blocks.two_layers(hidden, up, down, config.hidden_act, width)
            return self.blocks.norm(self.builder.add(found, hidden), f"{prefix}{names.ffn_norm}")

    def _attention(self, x: Value, prefix: str, bias: Value | None, keep: Value | None) -> Value:
        blocks, config, names = self.blocks, self.config, self.names
        heads = (config.num_attention_heads, config.head_dim)
        query = blocks.heads(x, f"{prefix}{names.query}", heads, "q")
        keys = blocks.as_keys(x)
        key = blocks.heads(keys, f"{prefix}{names.key}", heads, "kv")
        value = blocks.heads(keys, f"{prefix}{names.value}", heads, "kv")
        masks = () if keep is None else (keep,)
        mixed = blocks.attend(query, key, value, config.head_dim**-0.5, bias=bias, masks=masks)
        return blocks.linear(mixed, f"{prefix}{names.output}", ("embed", config.hidden_size), "q")
