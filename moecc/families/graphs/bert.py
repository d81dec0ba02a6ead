"""The graph of a BERT encoder: learned positions, norms after the sums, biases everywhere."""

from __future__ import annotations

from dataclasses import dataclass

from moecc.families.bert import BertConfig
from moecc.families.graphs.blocks import Blocks
from moecc.families.graphs.parameters import GraphRequest, Parameters
from moecc.ir.graph import Graph, Value
from moecc.types import I32, PRED, tensor

BIAS_TABLE = "encoder.relative_attention_bias.weight"
FURTHEST = 128
"""The distance from which on all of mpnet's distances share one bucket."""


def build(config: BertConfig, request: GraphRequest) -> Graph:
    """Return the graph from ``tokens : i32[batch, seq]`` to ``hidden : f32[batch, seq, embed]``.

    All tokens are of type 0, as in a single text.  With
    padding there is an input ``mask : pred[batch, seq]``, true where a token is one; padding is
    behind the text.  A sequence is no longer than the number of positions.
    """
    encoder = _BertEncoder(Parameters.of(config, request), config)
    graph, batch, seq = encoder.params.graph, request.batch, request.seq
    tokens = graph.input("tokens", tensor(I32, batch=batch, seq=seq))
    mask = graph.input("mask", tensor(PRED, batch=batch, seq=seq)) if request.padding else None
    keep = None
    with encoder.builder.at("embed"):
        if mask is not None:
            keep = encoder.as_keys(mask)
        hidden = encoder.embed(tokens)
        bias = encoder.bias(tokens)
    for layer in range(config.num_hidden_layers):
        hidden = encoder.layer(hidden, layer, bias, keep)
    graph.set_output("hidden", hidden)
    encoder.add_head(hidden, request.head)
    return graph


@dataclass(frozen=True)
class _BertEncoder(Blocks):
    """The parts of the encoder."""

    config: BertConfig

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
        hidden = self.norm(hidden, "embeddings.LayerNorm")
        if not config.is_narrow:
            return hidden
        to = ("embed", config.hidden_size)
        return self.linear(hidden, self.names.narrow[0], to, self._word)

    @property
    def _word(self) -> str:
        """The axis of the tables of the embeddings, which may be narrower than the model."""
        return "word" if self.config.is_narrow else "embed"

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
        key = self.as_keys(query)
        buckets = builder.relative_buckets(
            query, key, bidirectional=True, buckets=count, max_distance=FURTHEST
        )
        axes = {"bucket": count, "head": self.config.num_attention_heads}
        table = self.params.plain(BIAS_TABLE, builder.loc, **axes)
        return builder.embedding(table, buckets, axis="bucket", name="bias")

    def _table(self, word: str, axis: str, size: int) -> Value:
        name = f"embeddings.{word}_embeddings.weight"
        axes = {axis: size, self._word: self.config.embedding_width}
        return self.params.plain(name, self.builder.loc, **axes)

    def layer(self, hidden: Value, layer: int, bias: Value | None, keep: Value | None) -> Value:
        """Emit one layer: each sublayer's result is added, and then the sum normalised."""
        names, config = self.names, self.config
        prefix = config.layer_name(layer)
        with self.builder.at(f"layers.{layer}.attention"):
            words = (names.query, names.key, names.value, names.output)
            mixed = self.attention(
                hidden, None, [f"{prefix}{word}" for word in words],
                (config.num_attention_heads, config.head_dim),
                bias=bias, masks=() if keep is None else (keep,),
            )  # fmt: skip
            hidden = self.builder.add(mixed, hidden)
            hidden = self.norm(hidden, f"{prefix}{names.norms[0]}")
        with self.builder.at(f"layers.{layer}.ffn"):
            mixed = self.feed_forward(hidden, prefix)
            return self.norm(self.builder.add(mixed, hidden), f"{prefix}{names.norms[1]}")
