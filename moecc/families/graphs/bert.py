"""The graph of a BERT encoder: learned positions, norms after the sums, biases everywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moecc.families.bert import BertConfig
from moecc.families.deberta import C2P, P2C, DebertaV2Config
from moecc.families.graphs.blocks import Bias, Blocks
from moecc.families.graphs.decoder import Rotation, rope_tables
from moecc.families.graphs.parameters import GraphRequest, Parameters
from moecc.families.modernbert import ModernBertConfig
from moecc.families.rope import RopeConfig
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Value

TYPE_TABLE = "embeddings.token_type_embeddings.weight"
BIAS_TABLE = "encoder.relative_attention_bias.weight"
FURTHEST = 128
"""The distance from which on all of mpnet's distances share one bucket."""


Norm = Callable[[Value, str], Value]


@dataclass(frozen=True)
class View:
    """What the tokens of a layer see, and how its heads are rotated.

    Attributes:
      masks: which keys a query sees, ``[seq, kv_seq]``.
      tables: the rotary tables; None for no rotation.
    """

    masks: tuple[Value, ...] = ()
    tables: Rotation | None = None

    def rotate(self, builder: Builder) -> Callable[[Value], Value] | None:
        """Return what rotates heads; None if nothing does."""
        if self.tables is None:
            return None
        cos, sin = self.tables
        return lambda heads: builder.rotate(heads, cos, sin, axis="head_dim")


def build(config: BertConfig, request: GraphRequest) -> Graph:
    """Return the graph from ``tokens : i32[batch, seq]`` to ``hidden : f32[batch, seq, embed]``.

    All tokens are of type 0, as in a single text.  With
    padding there is an input ``mask : pred[batch, seq]``, true where a token is one; padding is
    behind the text.  A sequence is no longer than the number of positions.
    """
    encoder = _BertEncoder(Parameters.of(config, request), config)
    graph = encoder.params.graph
    tokens, mask = request.tokens(graph), request.mask(graph)
    keep = None
    with encoder.builder.at("embed"):
        if mask is not None:
            keep = encoder.as_keys(mask)
        hidden = encoder.embed(tokens)
        bias = encoder.bias(tokens)
        distances = encoder.distances(tokens)
        views = encoder.views(tokens)
    for layer in range(config.num_hidden_layers):
        view = views[min(len(views) - 1, 0 if config.is_global(layer) else 1)]
        of_layer = bias if distances is None else encoder.terms(layer, *distances)
        hidden = encoder.layer(hidden, layer, of_layer, keep, view)
    if config.names.around[1]:
        with encoder.builder.at("norm"):
            hidden = encoder.whole_norm(hidden, config.names.around[1])
    graph.set_output("hidden", hidden)
    encoder.add_head(hidden, request.head, mask)
    return graph


@dataclass(frozen=True)
class _BertEncoder(Blocks):
    """The parts of the encoder."""

    config: BertConfig

    def embed(self, tokens: Value) -> Value:
        """Emit words + positions + the type 0, normalised, ``[batch, seq, embed]``."""
        builder, config = self.builder, self.config
        words = self._table(self.names.embedding, "vocab", config.vocab_size)
        hidden = builder.embedding(words, tokens, axis="vocab", name="words")
        if config.has_types:
            first = builder.constant(value=0.0, dtype="i32")
            types = self._table(TYPE_TABLE, "type", config.type_vocab_size)
            hidden = builder.add(hidden, builder.embedding(types, first, axis="type", name="type"))
        if config.has_positions:
            table = self._positions()
            positions = builder.positions(tokens, axis="seq", name="positions")
            hidden = builder.add(hidden, builder.embedding(table, positions, axis="position"))
        hidden = self.whole_norm(hidden, self.names.around[0])
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
        table = self._table(self.names.positions, "position", count)
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

    def distances(self, tokens: Value) -> tuple[Value, Value] | None:
        """Emit the table of distances, ``[bucket, embed]``, and which row each pair has, if any.

        A row is looked up by a product with ones and zeros, ``[seq, kv_seq, bucket]``: rows differ
        from query to query, and an embedding's do not.
        """
        config, builder = self.config, self.builder
        if not (isinstance(config, DebertaV2Config) and config.relative_attention):
            return None
        count, longest = config.distances
        query = builder.positions(tokens, axis="seq", name="positions")
        rows = builder.signed_buckets(
            query, self.as_keys(query), buckets=count, max_distance=longest, name="buckets"
        )
        axes = {"bucket": count, "embed": config.hidden_size}
        table = self.params.plain("encoder.rel_embeddings.weight", builder.loc, **axes)
        table = self.norm(table, "encoder.LayerNorm" if config.relative_norm else "")
        return table, builder.one_hot(rows, into=(("bucket", count),), name="distances")

    def terms(self, layer: int, table: Value, rows: Value) -> Callable[[Value, Value], Value]:
        """Return what emits the terms of the scores with distances, ``[…, seq, head, kv_seq]``.

        Args:
          layer: the number of the layer.
          table: the table of distances.
          rows: which row each pair of a query and a key has.
        """
        config, builder, names = self.config, self.builder, self.names
        assert isinstance(config, DebertaV2Config), "a family with a table of distances"
        prefix, heads = config.layer_name(layer), (config.num_attention_heads, config.head_dim)
        # A query meets the keys of distances, and a key their queries.
        shared = (names.key, names.query)
        apart = ("attention.self.pos_key_proj", "attention.self.pos_query_proj")
        words = dict(zip((C2P, P2C), shared if config.share_att_key else apart, strict=True))

        def emit(query: Value, key: Value) -> Value:
            terms = []
            for term, content, axis in ((C2P, query, "kv"), (P2C, key, "q")):
                if term in config.terms:
                    far = self.heads(table, f"{prefix}{words[term]}", heads, axis)
                    met = builder.contract(content, far, over="head_dim")
                    terms.append(builder.contract(met, rows, over="bucket", name=term))
            total = terms[0] if len(terms) == 1 else builder.add(*terms)
            return builder.scale(total, by=config.score_scale)

        return emit

    def whole_norm(self, x: Value, name: str) -> Value:
        """Emit a norm, whose bias a modernbert may lack."""
        has_bias = not isinstance(self.config, ModernBertConfig) or self.config.norm_bias
        return self.norm(x, name, has_bias=has_bias)

    def heads(
        self, x: Value, name: str, heads: tuple[int, int], axis: str, *, has_bias: bool = True
    ) -> Value:
        """Emit a projection to heads, which may be a third of a matrix."""
        if not self.names.qkv:
            return super().heads(x, name, heads, axis, has_bias=has_bias)
        module, _, word = name.rpartition(".")
        to = (axis, heads[0] * heads[1])
        y = self.part(x, module, word, "qkv".index(word), to, 3, has_bias=has_bias)
        return self.split(y, axis, heads)

    def views(self, tokens: Value) -> list[View]:
        """Emit what tokens see: in layers that see all tokens, and in those with a window."""
        builder, config = self.builder, self.config
        if not (config.is_causal or isinstance(config, ModernBertConfig)):
            return [View()]
        positions = builder.positions(tokens, axis="seq", name="positions")
        keys = self.as_keys(positions)
        if not isinstance(config, ModernBertConfig):
            return [View((builder.causal(positions, keys, name="causal"),))]
        half = config.window // 2
        # As many keys ahead as behind: those up to a position that is ahead by half a window.
        ahead = builder.add(positions, builder.constant(value=float(half), dtype="i32"))
        seen = builder.causal(ahead, keys, window=2 * half + 1, name="seen")
        bases = (config.global_rope_theta, config.local_rope_theta)
        tables = [
            rope_tables(builder, positions, RopeConfig(theta=theta), config.head_dim, 0)
            for theta in bases
        ]
        return [View((), tables[0]), View((seen,), tables[1])]

    def _table(self, name: str, axis: str, size: int) -> Value:
        axes = {axis: size, self._word: self.config.embedding_width}
        return self.params.plain(name, self.builder.loc, **axes)

    def layer(
        self, hidden: Value, layer: int, bias: Bias | None, keep: Value | None, view: View
    ) -> Value:
        """Emit one layer; what sublayers read is normalised, or the sums that they return."""
        names, config, builder = self.names, self.config, self.builder
        prefix = config.layer_name(layer)
        first, second = (f"{prefix}{name}" for name in names.norms)
        modern = config if isinstance(config, ModernBertConfig) else None
        if modern is not None and layer == 0:
            first = ""  # The embeddings are normalised already.
        before, after = self._norms()
        with builder.at(f"layers.{layer}.attention"):
            mixed = self.attention(
                before(hidden, first), None, names.projections(prefix),
                (config.num_attention_heads, config.head_dim),
                bias=bias, scale=config.score_scale,
                masks=(*view.masks, *(() if keep is None else (keep,))),
                unbiased="" if modern is None or modern.attention_bias else "qkvo",
                rotate=view.rotate(builder),
            )  # fmt: skip
            hidden = after(builder.add(mixed, hidden), first)
        with builder.at(f"layers.{layer}.ffn"):
            x = before(hidden, second)
            if modern is not None:
                mixed = self.gated(x, prefix, config.hidden_act, has_bias=modern.mlp_bias)
            else:
                mixed = self.feed_forward(x, prefix)
            return after(builder.add(mixed, hidden), second)

    def _norms(self) -> tuple[Norm, Norm]:
        """Return what sublayers do to what they read, and to the sum."""

        def nothing(x: Value, name: str) -> Value:
            return x

        return (self.whole_norm, nothing) if self.config.norms_first else (nothing, self.whole_norm)
