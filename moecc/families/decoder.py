"""The graph of a decoder-only model, dense or sparse, of any family."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from moecc.families.attention import Tables, attention, emit_rms_norm, soft_capped
from moecc.families.configs import DecoderConfig
from moecc.families.feedforward import feed_forward
from moecc.families.names import names_of
from moecc.families.parameters import DtypeOf, Parameters, float32_of
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Value
from moecc.types import I32, Size, tensor

NORMS = {
    "before": ("input_layernorm", "", "post_attention_layernorm", ""),
    "after": ("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
    "around": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}
"""By placement the norms before and after the attention, and before and after the feed-forward."""


def build_decoder(
    config: DecoderConfig,
    dtype_of: DtypeOf | None = None,
    checkpoint: str = "",
    *,
    layout: str = "experts",
    batch: Size = "B",
    seq: Size = "S",
) -> Graph:
    """Return the graph from ``tokens : i32[batch, seq]`` to ``logits : f32[batch, seq, vocab]``.

    Args:
      config: the config.
      dtype_of: the element type of each tensor on disk; float32 by default.
      checkpoint: the path of the weights, for the graph's attributes.
      layout: ``experts`` (one tensor an expert) or ``fused`` (as transformers 5 stores them).
      batch: the size of the batch axis.
      seq: the size of the sequence axis.
    """
    attrs = {"family": config.model_type, "config": config.to_json(), "checkpoint": checkpoint}
    graph = Graph(config.model_type, attrs)
    params = Parameters(graph, names_of(config.model_type), dtype_of or float32_of, layout)
    decoder = _Decoder(Builder(graph), config, params)
    tokens = graph.input("tokens", tensor(I32, batch=batch, seq=seq))
    with decoder.builder.at("embed"):
        hidden = decoder.embed(tokens)
        tables = Tables.of(decoder.builder, config, tokens)
    for layer in range(config.num_hidden_layers):
        hidden = decoder.layer(hidden, layer, tables)
    with decoder.builder.at("norm"):
        hidden = decoder.norm(hidden, params.names.final_norm)
    with decoder.builder.at("head"):
        graph.set_output("logits", decoder.logits(hidden))
    return graph


@dataclass
class _Decoder:
    """The parts of the decoder."""

    builder: Builder
    config: DecoderConfig
    params: Parameters

    def embed(self, tokens: Value) -> Value:
        """Emit the embedded `tokens`, ``[batch, seq, embed]``, times the family's factor."""
        table = self._embedding()
        hidden = self.builder.embedding(table, tokens, axis="vocab", name="hidden")
        factor = self.config.embedding_multiplier
        if self.config.scale_embedding:
            factor *= sqrt(self.config.hidden_size)
        return self._times(hidden, factor)

    def layer(self, hidden: Value, layer: int, tables: Tables) -> Value:
        """Emit one layer: attention and feed-forward, each added to what it reads."""
        builder, config, params = self.builder, self.config, self.params
        names = NORMS[config.norm_placement]
        with builder.at(f"layers.{layer}.attention"):
            x = self._layer_norm(hidden, layer, names[0])
            made = attention(builder, x, layer, config, params, tables)
            hidden = self._added(hidden, self._layer_norm(made, layer, names[1]))
        with builder.at(f"layers.{layer}.ffn"):
            x = self._layer_norm(hidden, layer, names[2])
            made = feed_forward(builder, x, layer, config, params)
            return self._added(hidden, self._layer_norm(made, layer, names[3]))

    def norm(self, x: Value, name: str) -> Value:
        """Emit the norm with the scale `name`."""
        width, loc = self.config.hidden_size, self.builder.loc
        scale = self.params.plain(name, loc, embed=width)
        if self.config.layer_norm:
            bias = self.params.plain(f"{name.removesuffix('weight')}bias", loc, embed=width)
            eps = self.config.rms_norm_eps
            return self.builder.layer_norm(x, scale, bias, axis="embed", eps=eps, name="norm")
        return emit_rms_norm(self.builder, x, scale, "embed", self.config, name="norm")

    def logits(self, hidden: Value) -> Value:
        """Emit the logits of the normalised `hidden`."""
        logits = self.builder.contract(hidden, self._head(), over="embed", name="logits")
        if self.config.head_bias:
            name = f"{self.params.names.head.removesuffix('weight')}bias"
            bias = self.params.plain(name, "head", vocab=self.config.vocab_size)
            logits = self.builder.add(logits, bias)
        by = 1 / self.config.logits_divisor
        return soft_capped(self.builder, logits, self.config.logit_softcap, by)

    def _layer_norm(self, x: Value, layer: int, word: str) -> Value:
        prefix = self.params.names.layer.format(layer=layer)
        return self.norm(x, f"{prefix}{word}.weight") if word else x

    def _added(self, hidden: Value, made: Value) -> Value:
        made = self._times(made, self.config.residual_multiplier)
        return self.builder.add(hidden, made, name="hidden")

    def _times(self, x: Value, factor: float) -> Value:
        return x if factor == 1 else self.builder.scale(x, by=factor)

    def _embedding(self) -> Value:
        axes = {"vocab": self.config.vocab_size, "embed": self.config.hidden_size}
        return self.params.plain(self.params.names.embedding, "embed", **axes)

    def _head(self) -> Value:
        if self.config.tie_word_embeddings:
            return self._embedding()
        axes = {"vocab": self.config.vocab_size, "embed": self.config.hidden_size}
        return self.params.plain(self.params.names.head, "head", **axes)
