"""The graph of a decoder-only model, dense or sparse, of any family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import prod, sqrt

from moecc.families.decoder import XIELU, DecoderConfig
from moecc.families.graphs.parameters import KV_SEQ, GraphRequest, Parameters, as_keys
from moecc.families.mixture import MoeConfig
from moecc.families.rope import RopeConfig, attention_factor
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Value
from moecc.ir.moe import emit_routing, emit_shared_gate

# The norms of decoders, of one parameter or one more than it.


def emit_norm(
    builder: Builder,
    x: Value,
    scale: Value | None,
    bias: Value | None,
    axis: str,
    config: DecoderConfig,
    *,
    name: str | None = None,
) -> Value:
    """Emit the norm of `x` along `axis`, of the kind that its parameters and the config say."""
    eps = config.rms_norm_eps
    if scale is not None and config.norm_offset:
        # The parameter stays as it is on disk; one more than it, rounded, would not come back.
        unit = builder.constant(value=1.0, name="one")
        scale = builder.add(scale, unit, name="gain")
    if scale is not None and bias is not None:
        return builder.layer_norm(x, scale, bias, axis=axis, eps=eps, name=name)
    if config.norm_kind != "rms":
        x = builder.sub(x, builder.mean(x, axes=axis))
    return emit_rms_norm(builder, x, scale, axis, eps, name=name)


def emit_rms_norm(
    builder: Builder,
    x: Value,
    scale: Value | None,
    axis: str,
    eps: float,
    *,
    name: str | None = None,
) -> Value:
    """Emit `x` divided by the root of its mean square along `axis`, times any scale.

    A scale may have further axes, as that of heads has.
    """
    if scale is not None and scale.type.names == (axis,):
        return builder.rms_norm(x, scale, axis=axis, eps=eps, name=name)
    square = builder.mean(builder.square(x), axes=axis)
    root = builder.rsqrt(builder.add(square, builder.constant(value=eps)))
    x = builder.mul(x, root, name=name)
    return x if scale is None else builder.mul(x, scale)


Rotation = tuple[Value, Value]
"""Cosines and sines, ``[seq, head_dim]``."""


@dataclass(frozen=True)
class Tables:
    """Values shared by all layers: rotary tables, and a causal mask for each distinct window.

    Attributes:
      rotations: by layer, the rotary tables; None for a layer without rotary positions.
      masks: by window in tokens, 0 for none, ``[seq, kv_seq]``.
      shifts: for lags of 1, 2 … the matrix that moves a sequence on by so many tokens,
        ``[seq, kv_seq]``.
      chunks: by length, which keys are not before the chunk of a query, ``[kv_seq, seq]``.
      growth: the factor on queries of layers without rotary positions, ``[seq]``; None: 1.
    """

    rotations: tuple[Rotation | None, ...]
    masks: Mapping[int, Value]
    shifts: tuple[Value, ...]
    chunks: Mapping[int, Value]
    growth: Value | None

    @classmethod
    def of(cls, builder: Builder, config: DecoderConfig, tokens: Value) -> Tables:
        """Emit the positions, rotary tables and masks of a model."""
        positions = builder.positions(tokens, axis="seq", name="positions")
        taps = [config.taps_of(layer) for layer in range(config.num_hidden_layers)]
        masked = [n for n, count in enumerate(taps) if not count or config.has_delta_rule(n)]
        ropes = [None if count else config.rope_of(layer) for layer, count in enumerate(taps)]
        tables: dict[RopeConfig | None, Rotation | None] = {None: None}
        for rope in ropes:
            if rope is not None and rope not in tables:
                tables[rope] = rope_tables(
                    builder, positions, rope, config.rotated_dim, config.max_position_embeddings
                )
        rotations = tuple(tables[rope] for rope in ropes)
        keys = as_keys(builder, positions)
        windows = dict.fromkeys(config.sliding_windows[layer] or 0 for layer in masked)
        masks = {w: builder.causal(positions, keys, window=w, name="causal") for w in windows}
        chunks = {
            size: builder.causal(keys, chunk_starts(builder, positions, size), name="in_chunk")
            for size in dict.fromkeys(config.attention_chunks or ())
            if size is not None
        }
        growth = None
        if config.growing_queries is not None and None in ropes:
            growth = query_growth(builder, positions, *config.growing_queries)
        shifts = shift_matrices(builder, positions, keys, max(taps))
        return cls(rotations, masks, shifts, chunks, growth)


def chunk_starts(builder: Builder, positions: Value, size: int) -> Value:
    """Emit for each position the first one of its chunk of `size`, exact below 2²⁴."""
    places = builder.cast(positions, dtype="f32", name="places")
    length = float(size)
    starts = builder.pointwise(places, function=f"mul(floor(div(a, {length})), {length})")
    return builder.cast(starts, dtype="i32", name="chunk_starts")


def query_growth(builder: Builder, positions: Value, interval: float, strength: float) -> Value:
    """Emit ``1 + strength · log(1 + ⌊(position + 1) / interval⌋)`` (Nakanishi 2501.19399)."""
    places = builder.cast(positions, dtype="f32", name="places")
    steps = f"floor(div(add(a, 1.0), {interval}))"
    function = f"add(mul(log1p({steps}), {strength}), 1.0)"
    return builder.pointwise(places, function=function, name="growth")


def shift_matrices(builder: Builder, positions: Value, keys: Value, taps: int) -> tuple[Value, ...]:
    """Emit the shifts of a convolution with `taps` taps, the longest lag being one less.

    A shift is the difference of two causal windows.  A product with it is exact, and is what
    caches of keys serve: a text is continued as by an attention.
    """
    recent = [
        builder.cast(builder.causal(positions, keys, window=window), dtype="f32", name="recent")
        for window in range(1, taps + 1)
    ]
    shifts = []
    for before, upto in pairwise(recent):
        unit = builder.constant(value=1.0, name="one")
        shifts.append(builder.mul(upto, builder.sub(unit, before), name="shift"))
    return tuple(shifts)


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
    fixed = builder.slice(x, axis="head_dim", start=size, stop=head_dim)
    turned = builder.rotate(turned, cos, sin, axis="head_dim")
    return builder.join(turned, fixed, axis="head_dim")


def soft_capped(builder: Builder, x: Value, cap: float | None, by: float = 1.0) -> Value:
    """Emit ``cap · tanh(by · x / cap)``, or ``by · x`` if there is no cap."""
    if cap is None:
        return x if by == 1 else builder.scale(x, by=by)
    return builder.scale(builder.tanh(builder.scale(x, by=by * (1 / cap))), by=cap)


def clipped(builder: Builder, x: Value, bound: float) -> Value:
    """Emit `x`, at most `bound` from 0."""
    bounds = [builder.constant(value=value) for value in (bound, -bound)]
    return builder.maximum(builder.minimum(x, bounds[0]), bounds[1])


def attention(
    builder: Builder,
    x: Value,
    layer: int,
    config: DecoderConfig,
    params: Parameters,
    tables: Tables,
) -> Value:
    """Emit the attention of one layer on the normalised `x`, ``[batch, seq, embed]``."""
    heads, rotation, gate = _Heads(builder, layer, config, params), tables.rotations[layer], None
    if config.latent is not None:
        from moecc.families.graphs.mixers import latent_heads

        query, key, value = latent_heads(builder, x, heads.prefix, config, params, rotation)
    else:
        if config.attention_gate:
            gate = heads.project(x, "gate", heads.query_axes)
        query, key = heads.project(x, "q", heads.query_axes), heads.project(x, "k", heads.kv_axes)
        value = heads.project(x, "v", heads.kv_axes)
        if not config.qk_norm_last:
            query, key = heads.norm(query, "q"), heads.norm(key, "k")
        if rotation is None and tables.growth is not None:
            query = builder.mul(query, tables.growth)
        query = rotated(builder, query, rotation, config.head_dim)
        key = rotated(builder, key, rotation, config.head_dim)
        if config.qk_norm_last:
            query, key = heads.norm(query, "q"), heads.norm(key, "k")
    key, value = as_keys(builder, key), as_keys(builder, value)
    scores = builder.contract(query, key, over="head_dim", name="scores")
    scores = soft_capped(builder, scores, config.attention_softcap, config.score_scale)
    seen = tables.masks[config.sliding_windows[layer] or 0]
    scores = builder.mask(scores, seen)
    if config.attention_chunks is not None and (size := config.attention_chunks[layer]) is not None:
        scores = builder.mask(scores, tables.chunks[size])
    weights = builder.softmax(scores, axis=KV_SEQ, name="weights")
    if config.has_sinks:
        # A softmax over scores and one more, the sink, is that over the scores times
        # sigmoid(logsumexp(scores) − sink).
        sinks = params.plain(f"{heads.prefix}sinks", builder.loc, head=config.num_attention_heads)
        into = tuple(list(heads.query_axes.items())[:2])
        sink = builder.split(sinks, axis="head", into=into)
        total = builder.logsumexp(scores, axes=(KV_SEQ,))
        weights = builder.mul(weights, builder.sigmoid(builder.sub(total, sink)))
    mixed = builder.contract(weights, value, over=KV_SEQ, name="mixed")
    if gate is not None:
        mixed = builder.mul(mixed, builder.sigmoid(gate))
    return heads.output(mixed)


def short_convolution(
    builder: Builder,
    x: Value,
    layer: int,
    config: DecoderConfig,
    params: Parameters,
    tables: Tables,
) -> Value:
    """Emit ``out(c · conv(b · x))`` of the normalised `x`, each channel with taps of its own.

    b, c and x are the three parts of a projection; no token sees a later one.
    """
    prefix = params.names.layer.format(layer=layer) + params.names.convolution
    assert config.conv_taps is not None, "a layer convolves"
    width, taps, loc = config.hidden_size, config.conv_taps[layer], builder.loc

    def biased(y: Value, module: str, **axes: int) -> Value:
        if not config.conv_bias:
            return y
        return builder.add(y, params.plain(f"{prefix}{module}.bias", loc, **axes))

    weight = params.plain(f"{prefix}in_proj.weight", loc, channels=3 * width, embed=width)
    inner = builder.contract(x, weight, over="embed", name="inner")
    inner = biased(inner, "in_proj", channels=3 * width)
    before, after, signal = (
        builder.rename(
            builder.slice(inner, axis="channels", start=at, stop=at + width),
            axis="channels",
            to="channel",
        )
        for at in (0, width, 2 * width)
    )
    signal = builder.mul(before, signal)
    kernel = params.without_axis(
        f"{prefix}conv.weight", loc, "group", channel=width, group=1, tap=taps
    )

    from moecc.families.graphs.mixers import convolved

    mixed = biased(convolved(builder, signal, kernel, tables.shifts), "conv", channel=width)
    weight = params.plain(f"{prefix}out_proj.weight", loc, embed=width, channel=width)
    out = builder.contract(builder.mul(after, mixed), weight, over="channel")
    return biased(out, "out_proj", embed=width)


@dataclass
class _Heads:
    """The projections of one layer's attention."""

    builder: Builder
    layer: int
    config: DecoderConfig
    params: Parameters

    @property
    def prefix(self) -> str:
        return self.params.names.layer.format(layer=self.layer) + self.params.names.attention

    @property
    def kv_axes(self) -> dict[str, int]:
        return {"kv_head": self.config.num_key_value_heads, "head_dim": self.config.head_dim}

    @property
    def query_axes(self) -> dict[str, int]:
        if self.config.latent is not None:
            return {"head": self.config.num_attention_heads, "head_dim": self.config.head_dim}
        # Query heads that share a key head are neighbours, so the key head is the outer axis.
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        kv = self.config.num_key_value_heads
        return {"kv_head": kv, "query_group": groups, "head_dim": self.config.head_dim}

    def project(self, x: Value, letter: str, into: dict[str, int]) -> Value:
        """Project to heads; the weight is not split, as on disk, but the result is."""
        axis, loc = "q" if letter in ("q", "gate") else "kv", self.builder.loc
        width = prod(into.values())
        y = self.builder.contract(x, self._weight(letter, axis, width), over="embed", name=letter)
        if self.config.qkv_bias:
            fused, axes = bool(self.params.names.qkv), {axis: width}
            bias = (
                self._fused(letter, "bias", axes)
                if fused
                else self._parameter(letter, "bias", **axes)
            )
            y = self.builder.add(y, bias)
        if self.config.qkv_clip is not None:
            y = clipped(self.builder, y, self.config.qkv_clip)
        if self.config.qk_norm_across and letter in ("q", "k"):
            scale = self.params.plain(f"{self._norm_name(letter)}.weight", loc, **{axis: width})
            y = emit_norm(self.builder, y, scale, None, axis, self.config)
        return self.builder.split(y, axis=axis, into=tuple(into.items()))

    def _weight(self, letter: str, axis: str, width: int) -> Value:
        axes = {axis: width, "embed": self.config.hidden_size}
        if not self.params.names.qkv:
            return self._parameter(letter, "weight", **axes)
        return self._fused(letter, "weight", axes)

    def _fused(self, letter: str, kind: str, axes: dict[str, int]) -> Value:
        """Return a part of the one matrix of queries, keys and values, or of its bias."""
        name, of = (f"{self.prefix}{n}.{kind}" for n in (f"{letter}_proj", self.params.names.qkv))
        loc, kv = self.builder.loc, self.config.num_key_value_heads
        queries, keys = prod(self.query_axes.values()), prod(self.kv_axes.values())
        if self.params.names.qkv_by_group:
            count = queries // keys
            at = {"q": (0, count), "k": (count, count + 1), "v": (count + 1, count + 2)}[letter]
            heads = (kv, count + 2, self.config.head_dim)
            return self.params.group_part(name, of, loc, at, heads, axes)
        start = {"q": 0, "k": queries, "v": queries + keys}[letter]
        return self.params.part(name, of, loc, start, ("qkv", queries + 2 * keys), axes)

    def _parameter(self, letter: str, kind: str, **axes: int) -> Value:
        """Return a matrix or bias whose rows are those of heads, in the order of the graph."""
        name, loc = f"{self.prefix}{letter}_proj.{kind}", self.builder.loc
        if self.config.attention_gate and letter in ("q", "gate"):
            # For each head its query, and then its gate.
            of, heads = f"{self.prefix}q_proj.{kind}", self.config.num_attention_heads
            name = f"{self.prefix}{'query' if letter == 'q' else 'gate'}.{kind}"
            part = (("q", "gate").index(letter), 2)
            return self.params.head_part(
                name, of, loc, part, (heads, self.config.head_dim), axes, next(iter(axes))
            )
        if letter == "v":
            return self.params.plain(name, loc, **axes)
        return self.params.turned(name, loc, self.config.head_dim, self.config.rotated_dim, axes)

    def _norm_name(self, letter: str) -> str:
        names = self.params.names
        return f"{self.prefix}{names.query_norm if letter == 'q' else names.key_norm}"

    def norm(self, x: Value, letter: str) -> Value:
        """Normalise each head by itself, if the family does."""
        config, loc, name = self.config, self.builder.loc, self._norm_name(letter)
        if not config.qk_norm or config.qk_norm_across:
            return x
        if config.qk_norm_plain:
            has_rope = config.rope_of(self.layer) is not None
            return emit_norm(self.builder, x, None, None, "head_dim", config) if has_rope else x
        if not config.qk_norm_each:
            scale = self.params.plain(f"{name}.weight", loc, head_dim=config.head_dim)
            bias = None
            if config.norm_kind == "layer":
                bias = self.params.plain(f"{name}.bias", loc, head_dim=config.head_dim)
            return emit_norm(self.builder, x, scale, bias, "head_dim", config)
        into = tuple(list((self.query_axes if letter == "q" else self.kv_axes).items())[:-1])
        count = prod(size for _, size in into)
        scale = self.params.of_heads(f"{name}.weight", loc, count, config.head_dim)
        scale = self.builder.split(scale, axis="head", into=into)
        return emit_norm(self.builder, x, scale, None, "head_dim", config)

    def output(self, mixed: Value) -> Value:
        loc, embed = self.builder.loc, self.config.hidden_size
        merged = self.builder.merge(mixed, axes=tuple(self.query_axes), into="q")
        latent = self.config.latent
        value_dim = self.config.head_dim if latent is None else latent.value_dim
        width = self.config.num_attention_heads * value_dim
        name = f"{self.prefix}{self.params.names.attention_output}"
        weight = self.params.plain(f"{name}.weight", loc, embed=embed, q=width)
        y = self.builder.contract(merged, weight, over="q")
        if self.config.output_bias:
            y = self.builder.add(y, self.params.plain(f"{name}.bias", loc, embed=embed))
        return y


# Feed-forward blocks: dense, and as a mixture of experts.

ACTIVATION_OPS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""The operation of each activation of a config that is one operation."""


Activation = Callable[[Value], Value]


def activated(builder: Builder, x: Value, act: str | Activation) -> Value:
    """Emit an activation of `x`, which is a function or has the name of configs."""
    if not isinstance(act, str):
        return act(x)
    if act == "relu2":
        return builder.square(builder.relu(x))
    if act == "quick_gelu":
        return builder.mul(x, builder.sigmoid(builder.scale(x, by=1.702)))
    return builder.node(ACTIVATION_OPS[act], x).result


Matrix = Callable[[str], Value]
Bias = Callable[[str], Value | None]


def gated(
    builder: Builder,
    x: Value,
    act: str | Activation,
    matrix: Matrix,
    bias: Bias,
    *,
    is_gated: bool = True,
) -> Value:
    """Emit ``down(act(gate(x)) · up(x))``, or without a gate ``down(act(up(x)))``.

    `matrix` and `bias` return the parameters by name.

    The same operations serve a dense block and the experts, whose matrices and rows have an
    additional expert axis.
    """

    def linear(value: Value, name: str, over: str) -> Value:
        y = builder.contract(value, matrix(name), over=over, name=name)
        shift = bias(name)
        return y if shift is None else builder.add(y, shift)

    hidden = activated(builder, linear(x, "gate" if is_gated else "up", "embed"), act)
    if is_gated:
        hidden = builder.mul(hidden, linear(x, "up", "embed"))
    return linear(hidden, "down", "mlp")


def two_or_three(
    builder: Builder, x: Value, act: str, matrix: Callable[[str], Value], is_gated: bool
) -> Value:
    """Emit a block without biases: ``down(act(up(x)))``, or with a gate the three of `gated`."""
    return gated(builder, x, act, matrix, lambda name: None, is_gated=is_gated)


def feed_forward(
    builder: Builder, x: Value, layer: int, config: DecoderConfig, params: Parameters
) -> Value:
    """Emit the feed-forward block of one layer on the normalised `x`, ``[batch, seq, embed]``."""
    prefix = params.names.layer.format(layer=layer)
    if isinstance(config, MoeConfig) and config.sparse_layers[layer]:
        return _sparse(builder, x, prefix, config, params)
    return _dense(builder, x, prefix + params.names.dense, config.intermediate_size, config, params)


def _dense(
    builder: Builder,
    x: Value,
    prefix: str,
    width: int,
    config: DecoderConfig,
    params: Parameters,
) -> Value:
    axes = ffn_axes(config.hidden_size, width)

    names = params.names
    modules = {"gate": names.dense_gate, "up": names.dense_up, "down": names.dense_down}

    def matrix(name: str) -> Value:
        full, fused = f"{prefix}{modules[name]}.weight", names.gate_up
        if not fused or name == "down":
            return params.plain(full, builder.loc, **axes[name])
        at, of = (0 if name == "gate" else width), f"{prefix}{fused}.weight"
        return params.part(full, of, builder.loc, at, ("mlp", 2 * width), axes[name])

    def bias(name: str) -> Value | None:
        if not config.mlp_bias:
            return None
        out = next(iter(axes[name]))
        return params.plain(f"{prefix}{modules[name]}.bias", builder.loc, **{out: axes[name][out]})

    act: str | Activation = config.hidden_act
    if act == XIELU:
        act = partial(xielu, builder, params, f"{prefix}act_fn.")
    return gated(builder, x, act, matrix, bias, is_gated=config.gated_mlp)


def xielu(builder: Builder, params: Parameters, prefix: str, x: Value) -> Value:
    """Emit xIELU with the parameters behind `prefix` (Huang and Schlag 2411.13010, §3).

    It is ``p · x² + b · x`` above 0, and ``(b + n) · (exp(min(x, e)) − 1 − x) + b · x`` elsewhere,
    with p = softplus(alpha_p) and n = softplus(alpha_n).
    """
    loc = builder.loc
    above, below = (
        builder.pointwise(
            params.without_axis(f"{prefix}{name}", loc, "one"), function="logaddexp(a, 0.0)"
        )
        for name in ("alpha_p", "alpha_n")
    )
    slope, edge = (params.plain(f"{prefix}{name}", loc) for name in ("beta", "eps"))
    square = builder.pointwise(x, function="square(relu(a))")
    grown = builder.pointwise(builder.minimum(x, edge), function="expm1(a)")
    step = builder.pointwise(x, function="where(greater(a, 0.0), 0.0, 1.0)")
    bent = builder.mul(builder.sub(grown, x), step)
    curve = builder.add(builder.mul(square, above), builder.mul(bent, below))
    return builder.add(curve, builder.mul(builder.add(bent, x), slope))


def ffn_axes(embed: int, mlp: int) -> dict[str, dict[str, int]]:
    """Return the axes of the three matrices on disk: outputs first, as PyTorch keeps them."""
    inward, back = {"mlp": mlp, "embed": embed}, {"embed": embed, "mlp": mlp}
    return {"gate": inward, "up": inward, "down": back}


def _sparse(
    builder: Builder, x: Value, prefix: str, config: MoeConfig, params: Parameters
) -> Value:
    embed, count, loc, clamp = config.hidden_size, config.num_experts, builder.loc, config.clamp
    shift, names = None, params.names
    bias = params.routing_bias(prefix, loc, expert=count) if config.routing_bias else None
    router = params.router(prefix, loc, expert=count, embed=embed)
    if clamp is not None:
        name = f"{prefix}{names.sparse}{names.router.removesuffix('weight')}bias"
        shift = params.plain(name, loc, expert=count)
    rows, finish = emit_routing(
        builder,
        x,
        router,
        experts=count,
        top_k=config.experts_per_token,
        gates=config.gates,
        scale=config.gate_scale,
        tokens=("batch", "seq"),
        bias=bias,
        shift=shift,
        floor=config.sum_floor,
        weighs_inputs=config.weighs_inputs,
        limit=(config.expert_groups, config.open_groups),
    )
    axes = ffn_axes(embed, config.expert_intermediate_size)

    def matrix(name: str) -> Value:
        return params.expert(prefix, name, loc, axes[name], count)

    if clamp is None:
        out = finish(gated(builder, rows, config.hidden_act, matrix, lambda name: None))
    else:

        def linear(x: Value, name: str, over: str) -> Value:
            weight = matrix(name)
            bias = params.expert_bias(prefix, name, loc, axes[name], count)
            return builder.add(builder.contract(x, weight, over=over, name=name), bias)

        out = finish(_clamped(builder, rows, clamp, linear))
    width = config.shared_expert_intermediate_size
    if width is None:
        return out
    shared_prefix = prefix + names.sparse + names.shared
    shared = _dense(builder, x, shared_prefix, width, config, params)
    if not config.shared_gate:
        return builder.add(out, shared)
    gate = params.shared_gate(prefix, loc, embed=embed)
    return builder.add(out, emit_shared_gate(builder, x, gate, shared))


def _clamped(
    builder: Builder,
    rows: Value,
    clamp: tuple[float, float],
    linear: Callable[[Value, str, str], Value],
) -> Value:
    """Emit ``down((up + 1) · gate · sigmoid(alpha · gate))`` with gate and up clamped."""
    alpha, bound = clamp
    limit, unit = (builder.constant(value=v) for v in (bound, 1.0))
    least = builder.constant(value=-bound)
    gate = builder.minimum(linear(rows, "gate", "embed"), limit)
    up = builder.maximum(builder.minimum(linear(rows, "up", "embed"), limit), least)
    opened = builder.mul(gate, builder.sigmoid(builder.scale(gate, by=alpha)))
    return linear(builder.mul(builder.add(up, unit), opened), "down", "mlp")


# The graph of a decoder-only model, dense or sparse, of any family.


def build(config: DecoderConfig, request: GraphRequest) -> Graph:
    """Return the graph from ``tokens : i32[batch, seq]`` to ``logits : f32[batch, seq, vocab]``."""
    params = Parameters.of(config, request)
    graph = params.graph
    decoder = _Decoder(Builder(graph), config, params)
    tokens = request.tokens(graph)
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
        table = self._vocabulary("embed", self.params.names.embedding)
        hidden = self.builder.embedding(table, tokens, axis="vocab", name="hidden")
        factor = self.config.embedding_multiplier
        if self.config.scale_embedding:
            factor *= sqrt(self.config.hidden_size)
        return self._times(hidden, factor)

    def layer(self, hidden: Value, layer: int, tables: Tables) -> Value:
        """Emit one layer: attention and feed-forward, each added to what it reads.

        Side by side the two read one value, in most families by one norm.
        """
        builder, config, params = self.builder, self.config, self.params
        names, before = config.layer_norms, hidden
        part = "conv" if config.taps_of(layer) else "attention"
        if config.has_delta_rule(layer):
            part = "linear_attention"
        with builder.at(f"layers.{layer}.{part}"):
            x = self._layer_norm(hidden, layer, names[0])
            if part == "linear_attention":
                from moecc.families.graphs.mixers import delta_rule

                activate = partial(activated, builder, act=config.hidden_act)
                shifts, seen = tables.shifts, tables.masks[0]
                block = delta_rule(builder, x, layer, config, params, shifts, seen, activate)
            else:
                mix = short_convolution if part == "conv" else attention
                block = mix(builder, x, layer, config, params, tables)
            hidden = self._added(hidden, self._layer_norm(block, layer, names[1]))
        with builder.at(f"layers.{layer}.ffn"):
            if config.norms_apart or not config.parallel:
                x = self._layer_norm(before if config.parallel else hidden, layer, names[2])
            block = feed_forward(builder, x, layer, config, params)
            return self._added(hidden, self._layer_norm(block, layer, names[3]))

    def norm(self, x: Value, name: str) -> Value:
        """Emit the norm with the scale `name`."""
        width, loc, kind = self.config.hidden_size, self.builder.loc, self.config.norm_kind
        scale = bias = None
        if kind != "layer without parameters":
            scale = self.params.plain(name, loc, embed=width)
        if kind == "layer":
            bias = self.params.plain(f"{name.removesuffix('weight')}bias", loc, embed=width)
        return emit_norm(self.builder, x, scale, bias, "embed", self.config, name="norm")

    def logits(self, hidden: Value) -> Value:
        """Emit the logits of the normalised `hidden`."""
        names = self.params.names
        tied = self.config.tie_word_embeddings
        loc, name = ("embed", names.embedding) if tied else ("head", names.head)
        head = self._vocabulary(loc, name)
        logits = self.builder.contract(hidden, head, over="embed", name="logits")
        if self.config.head_bias:
            name = f"{names.head.removesuffix('weight')}bias"
            bias = self.params.plain(name, "head", vocab=self.config.vocab_size)
            logits = self.builder.add(logits, bias)
        by = 1 / self.config.logits_divisor
        return soft_capped(self.builder, logits, self.config.logit_softcap, by)

    def _layer_norm(self, x: Value, layer: int, word: str) -> Value:
        prefix = self.params.names.layer.format(layer=layer)
        return self.norm(x, f"{prefix}{word}.weight") if word else x

    def _added(self, hidden: Value, block: Value) -> Value:
        block = self._times(block, self.config.residual_multiplier)
        return self.builder.add(hidden, block, name="hidden")

    def _times(self, x: Value, factor: float) -> Value:
        return x if factor == 1 else self.builder.scale(x, by=factor)

    def _vocabulary(self, loc: str, name: str) -> Value:
        axes = {"vocab": self.config.vocab_size, "embed": self.config.hidden_size}
        return self.params.plain(name, loc, **axes)
