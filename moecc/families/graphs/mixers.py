"""Mixers of tokens besides plain attention: short convolutions, delta rules, latent attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from moecc.families.decoder import LATENT_EPS, DecoderConfig, DeltaLayers
from moecc.families.graphs.parameters import KV_SEQ, Parameters, as_keys
from moecc.ir.builder import Builder
from moecc.ir.graph import Value


def convolved(builder: Builder, signal: Value, kernel: Value, shifts: Sequence[Value]) -> Value:
    """Emit `signal` convolved with earlier tokens, each channel with taps of its own.

    Args:
      builder: where operations are appended.
      signal: ``[batch, seq, channel]``.
      kernel: ``[channel, tap]``, the last of which is the token's own.
      shifts: the matrices that move a sequence on by 1, 2 … tokens.
    """
    taps = kernel.type["tap"].size
    assert isinstance(taps, int), "the taps are counted"

    def tap(lag: int) -> Value:
        column = builder.slice(kernel, axis="tap", start=taps - 1 - lag, stop=taps - lag)
        return builder.sum(column, axes="tap", name="tap")

    mixed, earlier = builder.mul(signal, tap(0)), as_keys(builder, signal)
    for lag, shift in enumerate(shifts[: taps - 1], 1):
        moved = builder.contract(shift, earlier, over=KV_SEQ, name="moved")
        mixed = builder.add(mixed, builder.mul(moved, tap(lag)))
    return mixed


DELTA_PARTS = {
    "query": ("in_proj_qkvz", "in_proj_qkv"),
    "key": ("in_proj_qkvz", "in_proj_qkv"),
    "value": ("in_proj_qkvz", "in_proj_qkv"),
    "gate": ("in_proj_qkvz", "in_proj_z"),
    "rate": ("in_proj_ba", "in_proj_b"),
    "decay": ("in_proj_ba", "in_proj_a"),
}
"""The projections of a gated delta rule, in their order within a matrix: the matrix that has a part
for each key head, and the one that has them by kind."""


def delta_rule(
    builder: Builder,
    x: Value,
    layer: int,
    config: DecoderConfig,
    params: Parameters,
    shifts: Sequence[Value],
    seen: Value,
    activate: Callable[[Value], Value],
) -> Value:
    """Emit the gated delta rule of one layer on the normalised `x`, ``[batch, seq, embed]``.

    Queries, keys and values go through a short convolution; a query reads what the tokens up to its
    own have written (Yang et al. 2412.06464, §3).

    Args:
      builder: where operations are appended.
      x: what the layer reads.
      layer: its number.
      config: the config of the model.
      params: its parameters.
      shifts: as for `convolved`.
      seen: the causal mask.
      activate: the activation of what is convolved.
    """
    delta, loc = config.delta, builder.loc
    assert delta is not None, "the layer has one"
    rule = _DeltaRule(builder, layer, config, delta, params)
    signal = rule.project(x, "query")
    for part in ("key", "value"):
        signal = builder.join(signal, rule.project(x, part), axis="channel")
    channels = {"channel": 2 * rule.keys + rule.values}
    name = f"{rule.prefix}conv1d.weight"
    kernel = params.without_axis(name, loc, "group", **channels, group=1, tap=delta.taps)
    signal = activate(convolved(builder, signal, kernel, shifts))
    ends = (0, rule.keys, 2 * rule.keys, 2 * rule.keys + rule.values)
    query, key, value = (
        builder.split(
            builder.slice(signal, axis="channel", start=start, stop=stop), axis="channel", into=into
        )
        for (start, stop), into in zip(
            pairwise(ends), (rule.key_axes, rule.key_axes, rule.value_axes), strict=True
        )
    )
    query = builder.scale(rule.unit(query), by=delta.key_dim**-0.5)
    rate = builder.sigmoid(rule.by_head(rule.project(x, "rate")))
    step = builder.add(
        rule.project(x, "decay"), params.plain(f"{rule.prefix}dt_bias", loc, channel=rule.heads)
    )
    speed = params.plain(f"{rule.prefix}A_log", loc, channel=rule.heads)
    speed = builder.pointwise(speed, function="exp(a)")
    step = builder.pointwise(step, function="logaddexp(a, 0.0)")
    decay = builder.pointwise(builder.mul(step, speed), function="exp(neg(a))", name="decay")
    written = rule.unit(key), value, rule.by_head(decay), rate
    key, value, decay, rate = (as_keys(builder, v) for v in written)
    read = builder.delta_rule(query, key, value, decay, rate, seen, over="head_dim", along=KV_SEQ)
    scale = params.plain(f"{rule.prefix}norm.weight", loc, value_dim=delta.value_dim)
    read = builder.rms_norm(read, scale, axis="value_dim", eps=config.rms_norm_eps)
    gate = builder.split(rule.project(x, "gate"), axis="channel", into=rule.value_axes)
    read = builder.mul(read, builder.silu(gate))
    merged = builder.merge(read, axes=tuple(name for name, _ in rule.value_axes), into="channel")
    out = params.plain(
        f"{rule.prefix}out_proj.weight", loc, embed=config.hidden_size, channel=rule.values
    )
    return builder.contract(merged, out, over="channel")


@dataclass
class _DeltaRule:
    """The projections of one layer's gated delta rule."""

    builder: Builder
    layer: int
    config: DecoderConfig
    delta: DeltaLayers
    params: Parameters

    @property
    def prefix(self) -> str:
        return self.params.names.layer.format(layer=self.layer) + self.params.names.delta

    @property
    def keys(self) -> int:
        return self.delta.key_heads * self.delta.key_dim

    @property
    def values(self) -> int:
        return self.delta.value_heads * self.delta.value_dim

    @property
    def heads(self) -> int:
        return self.delta.value_heads

    @property
    def key_axes(self) -> tuple[tuple[str, int], ...]:
        return (("key_head", self.delta.key_heads), ("head_dim", self.delta.key_dim))

    @property
    def value_axes(self) -> tuple[tuple[str, int], ...]:
        return (*self._head_axes, ("value_dim", self.delta.value_dim))

    @property
    def _head_axes(self) -> tuple[tuple[str, int], ...]:
        # Value heads that share a key head are neighbours, so the key head is the outer axis.
        groups = self.delta.value_heads // self.delta.key_heads
        return (("key_head", self.delta.key_heads), ("value_group", groups))

    def by_head(self, x: Value) -> Value:
        """Split numbers of value heads, ``[…, channel]``."""
        return self.builder.split(x, axis="channel", into=self._head_axes)

    def unit(self, x: Value) -> Value:
        """Emit queries or keys over their length, whose square has 10⁻⁶ added."""
        builder = self.builder
        square = builder.sum(builder.square(x), axes="head_dim")
        floor = builder.constant(value=1e-6, name="floor")
        return builder.mul(x, builder.rsqrt(builder.add(square, floor)))

    def project(self, x: Value, part: str) -> Value:
        """Project to one of `DELTA_PARTS`, ``[batch, seq, channel]``."""
        return self.builder.contract(x, self._weight(part), over="embed", name=part)

    def _weight(self, part: str) -> Value:
        params, loc, delta = self.params, self.builder.loc, self.delta
        each, count = delta.value_heads // delta.key_heads, delta.key_heads
        sizes = {
            **dict.fromkeys(("query", "key"), delta.key_dim),
            **dict.fromkeys(("value", "gate"), each * delta.value_dim),
            **dict.fromkeys(("rate", "decay"), each),
        }
        axes = {"channel": count * sizes[part], "embed": self.config.hidden_size}
        by_group, by_kind = DELTA_PARTS[part]
        matrix = by_group if params.names.delta_by_group else by_kind
        parts = [n for n, names in DELTA_PARTS.items() if matrix in names]
        of, name = f"{self.prefix}{matrix}.weight", f"{self.prefix}{part}.weight"
        before = sum(sizes[n] for n in parts[: parts.index(part)])
        width = sum(sizes[n] for n in parts)
        if len(parts) == 1:
            return params.plain(of, loc, **axes)
        if params.names.delta_by_group:
            at = (before, before + sizes[part])
            return params.group_part(name, of, loc, at, (count, width, 1), axes)
        return params.part(name, of, loc, count * before, ("parts", count * width), axes)


def latent_heads(
    builder: Builder,
    x: Value,
    prefix: str,
    config: DecoderConfig,
    params: Parameters,
    rotation: tuple[Value, Value] | None,
) -> tuple[Value, Value, Value]:
    """Emit queries, keys and values ``[batch, seq, head, head_dim]``, the rotated entries first.

    Those of the keys are of all heads; they are repeated, since caches, kernels and programs have
    keys by head.

    Args:
      builder: where operations are appended.
      x: the normalised input of the layer, ``[batch, seq, embed]``.
      prefix: the names of the layer's attention.
      config: of a model with latent attention.
      params: the parameters of the model.
      rotation: cosines and sines, ``[seq, head_dim]``; None for no rotation.
    """
    assert config.latent is not None, "the model has latent attention"
    latent, loc = config.latent, builder.loc
    count, width, embed = config.num_attention_heads, config.head_dim, config.hidden_size
    rotary, rank, nope = config.rotated_dim, latent.key_rank, width - config.rotated_dim

    def biased(y: Value, name: str, bias: Callable[[str], Value]) -> Value:
        return builder.add(y, bias(f"{prefix}{name}.bias")) if config.qkv_bias else y

    def normalised(y: Value, name: str, **axis: int) -> Value:
        scale = params.plain(f"{prefix}{name}.weight", loc, **axis)
        return builder.rms_norm(y, scale, axis=next(iter(axis)), eps=LATENT_EPS)

    source, name = x, "q_proj"
    if latent.query_rank is not None:
        axes, name = {"query_latent": latent.query_rank}, "q_b_proj"
        weight = params.plain(f"{prefix}q_a_proj.weight", loc, **axes, embed=embed)
        source = builder.contract(x, weight, over="embed", name="query_latent")
        source = biased(source, "q_a_proj", lambda name: params.plain(name, loc, **axes))
        source = normalised(source, "q_a_layernorm", **axes)
    over = source.type.axes[-1]
    assert isinstance(over.size, int), "the width of a model is known"
    axes, name = {"q": count * width, over.name: over.size}, f"{prefix}{name}.weight"
    weight = params.rotated_first(
        name, name, loc, (count, width), nope, axes, pairs=latent.interleaved
    )
    query = builder.contract(source, weight, over=over.name, name="q")
    query = builder.split(query, axis="q", into=(("head", count), ("head_dim", width)))
    query_rotary = builder.slice(query, axis="head_dim", start=0, stop=rotary)
    query_plain = builder.slice(query, axis="head_dim", start=rotary, stop=width)

    both = f"{prefix}kv_a_proj_with_mqa"

    def first(kind: str, **axes: int) -> Value:
        name, of = f"{prefix}kv_a_proj.{kind}", f"{both}.{kind}"
        return params.part(name, of, loc, 0, ("heads", rank + rotary), {"latent": rank, **axes})

    def shared(kind: str, **axes: int) -> Value:
        return params.rotated_first(
            f"{prefix}k_rope_proj.{kind}", f"{both}.{kind}", loc, (1, rank + rotary), rank,
            {"head_dim": rotary, **axes}, pairs=latent.interleaved, alone=True,
        )  # fmt: skip

    memory = builder.contract(x, first("weight", embed=embed), over="embed", name="latent")
    memory = biased(memory, "kv_a_proj", lambda name: first("bias"))
    memory = normalised(memory, "kv_a_layernorm", latent=rank)
    key_rotary = builder.contract(x, shared("weight", embed=embed), over="embed", name="k_rope")
    key_rotary = biased(key_rotary, "k_rope_proj", lambda name: shared("bias"))

    def by_head(letter: str, part: tuple[int, int]) -> Value:
        size, of = part[1] - part[0], f"{prefix}kv_b_proj.weight"
        weight = params.group_part(
            f"{prefix}{letter}_b_proj.weight", of, loc, part, (count, nope + latent.value_dim, 1),
            {"kv": count * size, "latent": rank},
        )  # fmt: skip
        y = builder.contract(memory, weight, over="latent", name=letter)
        return builder.split(y, axis="kv", into=(("head", count), ("head_dim", size)))

    if rotation is not None:
        query_rotary = builder.rotate(query_rotary, *rotation, axis="head_dim")
        key_rotary = builder.rotate(key_rotary, *rotation, axis="head_dim")
    key_rotary = builder.broadcast(key_rotary, query_rotary)
    key_plain, value = by_head("k", (0, nope)), by_head("v", (nope, nope + latent.value_dim))
    query = builder.join(query_rotary, query_plain, axis="head_dim")
    key = builder.join(key_rotary, key_plain, axis="head_dim")
    return query, key, value
