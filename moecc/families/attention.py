"""Causal self-attention with grouped queries and rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from moecc.families.configs import DecoderConfig, GptOssConfig, RopeConfig, attention_factor
from moecc.families.gpt_oss import sunk
from moecc.families.parameters import Parameters
from moecc.ir.builder import Builder
from moecc.ir.graph import Value

# The norms of decoders: RMS norms, of one parameter or one more than it, and layer norms.


def emit_rms_norm(
    builder: Builder,
    x: Value,
    scale: Value,
    axis: str,
    config: DecoderConfig,
    *,
    name: str | None = None,
) -> Value:
    """Emit the norm of `x` along `axis` with the parameter `scale`."""
    if config.norm_offset:
        # The parameter stays as it is on disk; one more than it, rounded, would not come back.
        one = builder.constant(value=1.0, name="one")
        scale = builder.add(scale, one, name="gain")
    return builder.rms_norm(x, scale, axis=axis, eps=config.rms_norm_eps, name=name)


KV_SEQ = "kv_seq"
"""The name of the sequence axis of keys and values."""

Rotation = tuple[Value, Value]
"""Cosines and sines, ``[seq, head_dim]``."""


def as_keys(builder: Builder, x: Value) -> Value:
    """Return `x` with its sequence axis renamed for keys and values."""
    return builder.rename(x, axis="seq", to=KV_SEQ)


@dataclass(frozen=True)
class Tables:
    """Values shared by all layers: rotary tables, and a causal mask for each distinct window.

    Attributes:
      rotations: by layer, the rotary tables; None for a layer without rotary positions.
      masks: by window in tokens, 0 for none, ``[seq, kv_seq]``.
    """

    rotations: tuple[Rotation | None, ...]
    masks: Mapping[int, Value]

    @classmethod
    def of(cls, builder: Builder, config: DecoderConfig, tokens: Value) -> Tables:
        """Emit the positions, rotary tables and masks of a model."""
        positions = builder.positions(tokens, axis="seq", name="positions")
        rotations = _rotations(builder, config, positions)
        keys = as_keys(builder, positions)
        windows = dict.fromkeys(w or 0 for w in config.sliding_windows)
        masks = {w: builder.causal(positions, keys, window=w, name="causal") for w in windows}
        return cls(rotations, masks)


def _rotations(
    builder: Builder, config: DecoderConfig, positions: Value
) -> tuple[Rotation | None, ...]:
    """Emit the distinct rotary tables, and return for each layer which it takes."""
    ropes = [_rope_of_layer(config, layer) for layer in range(config.num_hidden_layers)]
    made: dict[RopeConfig | None, Rotation | None] = {None: None}
    for rope in ropes:
        if rope is not None and rope not in made:
            made[rope] = rope_tables(
                builder, positions, rope, config.rotated_dim, config.max_position_embeddings
            )
    return tuple(made[rope] for rope in ropes)


def _rope_of_layer(config: DecoderConfig, layer: int) -> RopeConfig | None:
    if config.rope_layers is not None and not config.rope_layers[layer]:
        return None
    has_window = config.sliding_windows[layer] is not None
    return config.local_rope if has_window and config.local_rope is not None else config.rope


def rope_tables(
    builder: Builder, positions: Value, rope: RopeConfig, size: int, max_positions: int
) -> Rotation:
    """Emit the rotary tables of `rope` for heads with `size` rotated entries."""
    # By name, because the table completes what a config leaves out.
    attrs = _rope_attrs(rope, size, max_positions)
    cos, sin = builder.node("rope", positions, names=(), **attrs).results
    return cos, sin


def _rope_attrs(rope: RopeConfig, size: int, max_positions: int) -> dict[str, object]:
    attrs: dict[str, object] = {
        "axis": "head_dim",
        "size": size,
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
        "short_factors": rope.short_factor,
        "long_factors": rope.long_factor,
    }
    if rope.type == "dynamic":
        attrs["original_context"] = max_positions
    return {name: value for name, value in attrs.items() if value is not None}


def rotated(builder: Builder, x: Value, rotation: Rotation | None, head_dim: int) -> Value:
    """Emit `x` with the first entries of each head rotated, as many as the tables have.

    Args:
      builder: where operations are appended.
      x: queries or keys, ``[batch, seq, …, head_dim]``.
      rotation: the tables; None for no rotation.
      head_dim: the width of a head.
    """
    if rotation is None:
        return x
    cos, sin = rotation
    size = cos.type["head_dim"].size
    if size == head_dim:
        return builder.rotate(x, cos, sin, axis="head_dim")
    assert isinstance(size, int), "the width of a head is known"
    turned = builder.slice(x, axis="head_dim", start=0, stop=size)
    kept = builder.slice(x, axis="head_dim", start=size, stop=head_dim)
    turned = builder.rotate(turned, cos, sin, axis="head_dim")
    return builder.join(turned, kept, axis="head_dim")


def soft_capped(builder: Builder, x: Value, cap: float | None, by: float = 1.0) -> Value:
    """Emit ``cap · tanh(by · x / cap)``, or ``by · x`` if there is no cap."""
    if cap is None:
        return x if by == 1 else builder.scale(x, by=by)
    return builder.scale(builder.tanh(builder.scale(x, by=by * (1 / cap))), by=cap)


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
    rotation = tables.rotations[layer]
    query = rotated(builder, query, rotation, config.head_dim)
    key = as_keys(builder, rotated(builder, key, rotation, config.head_dim))
    value = as_keys(builder, value)
    scores = builder.contract(query, key, over="head_dim", name="scores")
    scores = soft_capped(builder, scores, config.attention_softcap, config.score_scale)
    seen = tables.masks[config.sliding_windows[layer] or 0]
    scores = builder.mask(scores, seen)
    weights = builder.softmax(scores, axis=KV_SEQ, name="weights")
    if isinstance(config, GptOssConfig) and not config.plain:
        sinks = params.plain(f"{heads.prefix}sinks", builder.loc, head=config.num_attention_heads)
        weights = sunk(builder, weights, scores, sinks, ("head", KV_SEQ))
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
        y = self.builder.contract(x, self._weight(letter, axis, width), over="embed", name=letter)
        if self.config.qkv_bias:
            name = f"{self.prefix}{letter}_proj.bias"
            y = self.builder.add(y, self.params.plain(name, self.builder.loc, **{axis: width}))
        if self.config.qk_norm_across and letter != "v":
            scale = self._norm_scale(letter, **{axis: width})
            y = emit_rms_norm(self.builder, y, scale, axis, self.config)
        return self.builder.split(y, axis=axis, into=tuple(into.items()))

    def _weight(self, letter: str, axis: str, width: int) -> Value:
        axes = {axis: width, "embed": self.config.hidden_size}
        name, fused = f"{self.prefix}{letter}_proj.weight", self.params.names.qkv
        if not fused:
            if letter == "v":
                return self.params.plain(name, self.builder.loc, **axes)
            head_dim = self.config.head_dim
            loc = self.builder.loc
            return self.params.turned(name, loc, width // head_dim, head_dim, axes)
        queries, keys = prod(self.query_axes.values()), prod(self.kv_axes.values())
        at = {"q": 0, "k": queries, "v": queries + keys}[letter]
        of, whole = f"{self.prefix}{fused}.weight", ("qkv", queries + 2 * keys)
        return self.params.part(name, of, self.builder.loc, at, whole, axes)

    def _norm_scale(self, letter: str, **axes: int) -> Value:
        return self.params.plain(f"{self.prefix}{letter}_norm.weight", self.builder.loc, **axes)

    def norm(self, x: Value, letter: str) -> Value:
        """Normalise each head by itself, if the family does."""
        if not self.config.qk_norm or self.config.qk_norm_across:
            return x
        scale = self._norm_scale(letter, head_dim=self.config.head_dim)
        return emit_rms_norm(self.builder, x, scale, "head_dim", self.config)

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
