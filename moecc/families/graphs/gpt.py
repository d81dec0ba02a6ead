"""The graph of a decoder of the GPT line: layer norms, biases, a block of two matrices."""

from __future__ import annotations

from dataclasses import dataclass

from moecc.families.gpt import GptConfig
from moecc.families.graphs.blocks import Blocks
from moecc.families.graphs.decoder import Rotation, clipped, rope_tables, rotated
from moecc.families.graphs.parameters import GraphRequest, Parameters
from moecc.ir.graph import Graph, Value

_PARTS = ("query", "key", "value")


def build(config: GptConfig, request: GraphRequest) -> Graph:
    """Return the graph from ``tokens : i32[batch, seq]`` to ``logits : f32[batch, seq, vocab]``.

    With learned positions a sequence is no longer than their number.
    """
    decoder = _Gpt(Parameters.of(config, request), config)
    graph = decoder.params.graph
    tokens = request.tokens(graph)
    with decoder.builder.at("embed"):
        positions = decoder.builder.positions(tokens, axis="seq", name="positions")
        hidden = decoder.embed(tokens, positions)
        rotation = decoder.rotation(positions)
        keys = decoder.as_keys(positions)
        causal = decoder.builder.causal(positions, keys, name="causal")
        bias = decoder.bias(positions, keys)
    for layer in range(config.num_hidden_layers):
        hidden = decoder.layer(hidden, layer, rotation, causal, bias)
    if config.norms_first:
        with decoder.builder.at("norm"):
            hidden = decoder.whole_norm(hidden, decoder.names.final_norm)
    with decoder.builder.at("head"):
        graph.set_output("logits", decoder.logits(hidden))
    return graph


@dataclass(frozen=True)
class _Gpt(Blocks):
    """The parts of the decoder."""

    config: GptConfig

    def embed(self, tokens: Value, positions: Value) -> Value:
        """Emit the embedded tokens, ``[batch, seq, embed]``, with learned positions added."""
        builder, config = self.builder, self.config
        hidden = builder.embedding(self._embedding(), tokens, axis="vocab", name="hidden")
        if self._is_narrow:
            to, name = ("embed", config.hidden_size), self.names.narrow[0]
            hidden = self.linear(hidden, name, to, "word", has_bias=False)
        if not self.names.positions:
            return self.whole_norm(hidden, self.names.around[0])
        first = config.position_offset
        count = config.max_position_embeddings + first
        axes = {"position": count, "embed": config.hidden_size}
        table = self.params.plain(self.names.positions, builder.loc, **axes)
        if first:
            table = builder.slice(table, axis="position", start=first, stop=count)
        return builder.add(hidden, builder.embedding(table, positions, axis="position"))

    def rotation(self, positions: Value) -> Rotation | None:
        """Emit the rotary tables, if the family has them."""
        if self.config.rotary is None:
            return None
        rope, size = self.config.rotary
        length = self.config.max_position_embeddings
        return rope_tables(self.builder, positions, rope, size, length)

    def bias(self, positions: Value, keys: Value) -> Value | None:
        """Emit the biases of the scores by distance, if the family has them."""
        if not self.config.has_alibi:
            return None
        heads = self.config.num_attention_heads
        return self.builder.alibi(positions, keys, axis="head", size=heads, name="bias")

    def whole_norm(self, x: Value, name: str) -> Value:
        """Emit a norm, with a bias if the family has biases."""
        return self.norm(x, name, has_bias=self.config.has_block_biases)

    def layer(
        self,
        hidden: Value,
        layer: int,
        rotation: Rotation | None,
        causal: Value,
        bias: Value | None,
    ) -> Value:
        """Emit one layer; attention and feed-forward block may read the same value."""
        builder, names = self.builder, self.names
        prefix, config = names.layer.format(layer=layer), self.config
        first, second = (f"{prefix}{name}" for name in names.norms)
        before = config.norms_first
        with builder.at(f"layers.{layer}.attention"):
            x = self.whole_norm(hidden, first) if before else hidden
            mixed = self._attention(x, prefix, layer, rotation, causal, bias)
            after = builder.add(hidden, mixed, name="hidden")
            after = after if before else self.whole_norm(after, first)
        with builder.at(f"layers.{layer}.ffn"):
            x = hidden if config.parallel_residual else after
            x = self.whole_norm(x, second) if before else x
            block = self.feed_forward(x, prefix, has_bias=config.has_block_biases)
            hidden = builder.add(after, block, name="hidden")
            return hidden if before else self.whole_norm(hidden, second)

    def logits(self, hidden: Value) -> Value:
        """Emit the logits of the normalised `hidden`."""
        if self._is_narrow:
            to, name = (self._word, self.config.embedding_width), self.names.narrow[1]
            hidden = self.linear(hidden, name, to, "embed", has_bias=False)
        return self.builder.contract(hidden, self._head(), over=self._word, name="logits")

    @property
    def _is_narrow(self) -> bool:
        return self.config.embedding_width != self.config.hidden_size

    @property
    def _word(self) -> str:
        """The axis of embeddings: that of the model, unless they are narrower."""
        return "word" if self._is_narrow else "embed"

    def _head(self) -> Value:
        if self.config.tie_word_embeddings:
            return self._embedding()
        axes = {"vocab": self.config.vocab_size, self._word: self.config.embedding_width}
        return self.params.plain(self.params.names.head, "head", **axes)

    def _embedding(self) -> Value:
        axes = {"vocab": self.config.vocab_size, self._word: self.config.embedding_width}
        return self.params.plain(self.params.names.embedding, "embed", **axes)

    def _attention(
        self,
        x: Value,
        prefix: str,
        layer: int,
        rotation: Rotation | None,
        causal: Value,
        bias: Value | None,
    ) -> Value:
        builder, config = self.builder, self.config
        query, key, value = (self._heads(x, prefix, n) for n in range(3))
        query = rotated(builder, query, rotation, config.head_dim)
        key = self.as_keys(rotated(builder, key, rotation, config.head_dim))
        scale, value = config.score_scale(layer), self.as_keys(value)
        mixed = self.attend(query, key, value, scale, bias=bias, masks=(causal,))
        name, to = f"{prefix}{self.names.output}", ("embed", config.hidden_size)
        return self.linear(mixed, name, to, "q", has_bias=config.attention_bias)

    def _heads(self, x: Value, prefix: str, part: int) -> Value:
        """Emit queries, keys or values by head, from their matrix or part of the fused one."""
        config, builder, names = self.config, self.builder, self.names
        axis, width = ("q" if part == 0 else "kv"), config.hidden_size
        if not names.qkv:
            heads = (config.num_attention_heads, config.head_dim)
            name = (names.query, names.key, names.value)[part]
            return self.heads(x, f"{prefix}{name}", heads, axis)
        name = f"{prefix}{names.qkv}"
        axes = self.stored({axis: width, "embed": width})
        y = builder.contract(x, self._part(name, "weight", part, axes), over="embed")
        if config.attention_bias:
            y = builder.add(y, self._part(name, "bias", part, {axis: width}))
        if config.qkv_clip is not None:
            y = clipped(builder, y, config.qkv_clip)
        return self.split(y, axis, (config.num_attention_heads, config.head_dim))

    def _part(self, name: str, kind: str, part: int, axes: dict[str, int]) -> Value:
        part_name = f"{name}.{_PARTS[part]}.{kind}"
        loc, cut = self.builder.loc, "q" if part == 0 else "kv"
        if self.names.by_head:
            heads = (self.config.num_attention_heads, self.config.head_dim)
            return self.params.head_part(
                part_name, f"{name}.{kind}", loc, (part, 3), heads, axes, cut
            )
        width = self.config.hidden_size
        fused = ("qkv", 3 * width)
        return self.params.part(part_name, f"{name}.{kind}", loc, part * width, fused, axes, cut)
