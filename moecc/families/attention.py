"""Causal self-attention with grouped queries and rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from moecc.families.configs import DecoderConfig, attention_factor
from moecc.families.parameters import Parameters
from moecc.ir.builder import Builder
from moecc.ir.graph import Value

KV_SEQ = "kv_seq"
"""The name of the sequence axis of keys and values."""


def as_keys(builder: Builder, x: Value) -> Value:
    """Return `x` with its sequence axis renamed for keys and values."""
    return builder.rename(x, axis="seq", to=KV_SEQ)


@dataclass(frozen=True)
class Tables:
    """Values shared by all layers: rotary tables, and a causal mask for each distinct window.

    Attributes:
      cos, sin: the rotary tables, ``[seq, head_dim]``.
      masks: by window in tokens, 0 for none, ``[seq, kv_seq]``.
    """

    cos: Value
    sin: Value
    masks: Mapping[int, Value]

    @classmethod
    def of(cls, builder: Builder, config: DecoderConfig, tokens: Value) -> Tables:
        """Emit the positions, rotary tables and masks of a model."""
        positions = builder.positions(tokens, axis="seq", name="positions")
        rope = _rope_attrs(config)
        # By name, because the table completes what a config leaves out.
        cos, sin = builder.node("rope", positions, names=(), **rope).results
        keys = as_keys(builder, positions)
        windows = dict.fromkeys(w or 0 for w in config.sliding_windows)
        masks = {w: builder.causal(positions, keys, window=w, name="causal") for w in windows}
        return cls(cos, sin, masks)


def _rope_attrs(config: DecoderConfig) -> dict[str, object]:
    rope = config.rope
    attrs: dict[str, object] = {
        "axis": "head_dim",
        "size": config.head_dim,
        "theta": rope.theta,
        "scaling": rope.type,
        "factor": rope.factor,
        "original_context": rope.original_max_position_embeddings,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "truncate": rope.truncate,
        "attention_factor": attention_factor(rope),
    }
    if rope.type == "dynamic":
        attrs["original_context"] = config.max_position_embeddings
    return {name: value for name, value in attrs.items() if value is not None}


def attention(
    builder: Builder,
    x: Value,
    layer: int,
    config: DecoderConfig,
    params: Parameters,
    tables: Tables,
) -> Value:
    """Emit the attention of one layer on the normalised `x`, ``[batch, seq, embed]``."""
    heads = _Heads(builder, layer, config, params)
    query = heads.queries(x)
    key = heads.keys(x)
    value = heads.project(x, "v", heads.kv_axes)
    query = builder.rotate(query, tables.cos, tables.sin, axis="head_dim")
    key = as_keys(builder, builder.rotate(key, tables.cos, tables.sin, axis="head_dim"))
    value = as_keys(builder, value)
    scores = builder.contract(query, key, over="head_dim", name="scores")
    scores = builder.scale(scores, by=config.head_dim**-0.5)
    seen = tables.masks[config.sliding_windows[layer] or 0]
    weights = builder.softmax(builder.mask(scores, seen), axis=KV_SEQ, name="weights")
    return heads.output(builder.contract(weights, value, over=KV_SEQ, name="mixed"))


@dataclass
class _Heads:
    """The projections of one layer's attention."""

    builder: Builder
    layer: int
    config: DecoderConfig
    params: Parameters

    @property
    def prefix(self) -> str:
        return self.params.names.layer.format(layer=self.layer) + "self_attn."

    @property
    def kv_axes(self) -> dict[str, int]:
        return {"kv_head": self.config.num_key_value_heads, "head_dim": self.config.head_dim}

    @property
    def query_axes(self) -> dict[str, int]:
        # Query heads that share a key head are neighbours, so the key head is the outer axis.
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        kv = self.config.num_key_value_heads
        return {"kv_head": kv, "query_group": groups, "head_dim": self.config.head_dim}

    def queries(self, x: Value) -> Value:
        return self.norm(self.project(x, "q", self.query_axes), "q")

    def keys(self, x: Value) -> Value:
        return self.norm(self.project(x, "k", self.kv_axes), "k")

    def project(self, x: Value, letter: str, into: dict[str, int]) -> Value:
        """Project to heads; the weight is not split, as on disk, but the result is."""
        axis = "q" if letter == "q" else "kv"
        width = prod(into.values())
        loc, embed = self.builder.loc, self.config.hidden_size
        name = f"{self.prefix}{letter}_proj"
        weight = self.params.plain(f"{name}.weight", loc, **{axis: width, "embed": embed})
        y = self.builder.contract(x, weight, over="embed", name=letter)
        if self.config.qkv_bias:
            y = self.builder.add(y, self.params.plain(f"{name}.bias", loc, **{axis: width}))
        return self.builder.split(y, axis=axis, into=tuple(into.items()))

    def norm(self, x: Value, letter: str) -> Value:
        if not self.config.qk_norm:
            return x
        name = f"{self.prefix}{letter}_norm.weight"
        weight = self.params.plain(name, self.builder.loc, head_dim=self.config.head_dim)
        return self.builder.rms_norm(x, weight, axis="head_dim", eps=self.config.rms_norm_eps)

    def output(self, mixed: Value) -> Value:
        loc, embed = self.builder.loc, self.config.hidden_size
        merged = self.builder.merge(mixed, axes=tuple(self.query_axes), into="q")
        width = self.config.num_attention_heads * self.config.head_dim
        name = f"{self.prefix}o_proj"
        weight = self.params.plain(f"{name}.weight", loc, embed=embed, q=width)
        y = self.builder.contract(merged, weight, over="q")
        if self.config.output_bias:
            y = self.builder.add(y, self.params.plain(f"{name}.bias", loc, embed=embed))
        return y
