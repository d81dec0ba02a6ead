"""Lowering of positions, of masks made of them, and of attention as one operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from moecc.errors import InputError
from moecc.ir.attention import (
    ATTENTIONS,
    KERNELS,
    AttentionAxes,
    AttentionFacts,
    AttentionProgram,
    choose_attention,
    facts_of,
)
from moecc.ir.graph import Node
from moecc.ir.ops.attention import (
    AlibiOp,
    AttentionOp,
    CausalOp,
    RelativeBucketsOp,
    RopeOp,
    RotateOp,
    SignedBucketsOp,
    alibi_slopes,
    bucket_starts,
    signed_starts,
)
from moecc_backends.xla.kernels.attention import (
    CUDNN_VARIES,
    AttentionArrays,
    AttentionRule,
    block_attention,
    cudnn_attention,
    splash_attention,
)
from moecc_backends.xla.lower.contract import softmax
from moecc_backends.xla.trace.context import AUTO, DIRECT, TraceContext, lowering
from moecc_backends.xla.trace.values import (
    Named,
    Operand,
    Rows,
    accumulator,
    broadcast_like,
    dtype_of,
    einsum,
    lifted,
    lifted_all,
)


@lowering("rope")
def _rope(ctx: TraceContext, node: Node, positions: Operand) -> tuple[Operand, ...]:
    attrs = RopeOp.of_node(node)
    wide = accumulator(ctx.dtype)

    def tables(full: Named) -> tuple[Named, Named]:
        half = full.array.astype(wide)[..., None] * _rates(attrs, full.array, wide)
        axes, factor = (*full.axes, attrs.axis), attrs.attention_factor
        cos, sin = (
            Named(_twice(f(half) * factor, ctx.options.target), axes) for f in (jnp.cos, jnp.sin)
        )
        return cos, sin

    return lifted_all(positions, tables)


def _twice(half: Array, target: str) -> Array:
    """Return ``[…, size]``, the entries of ``[…, size / 2]`` twice.

    On a CPU by a product with ones and zeros, which is exact: XLA computes a cosine within the
    loops of its users, for every head and sequence again, unless a product lies between.
    """
    if target != "cpu":
        return jnp.concatenate([half, half], axis=-1)
    unit = np.tile(np.eye(half.shape[-1], dtype=half.dtype), 2)
    return jnp.matmul(half, unit, precision="highest")


def _rates(attrs: RopeOp, positions: Array, dtype: DTypeLike) -> Array:
    """Return the angle per position of each pair of entries, ``[size / 2]``."""
    # The number of positions is known at run time only.
    length, context = jnp.max(positions, initial=0) + 1, attrs.original_context
    if attrs.scaling == "longrope":
        short, long = (jnp.asarray(attrs.frequencies(n), dtype) for n in (context, context + 1))
        return jnp.where(length > context, long, short)
    if attrs.scaling != "dynamic":
        return jnp.asarray(attrs.frequencies(0), dtype)
    # NTK scaling of bloc97 and emozilla.
    size, factor = attrs.size, attrs.factor
    grown = factor * jnp.maximum(length.astype(dtype), context) / context - (factor - 1)
    theta = attrs.theta * grown ** (size / (size - 2))
    return theta ** -(jnp.arange(0, size, 2, dtype=dtype) / size)


@lowering("rotate")
def _rotate(ctx: TraceContext, node: Node, x: Operand, *tables: Operand) -> Operand:
    def turn(full: Named) -> Named:
        at = full.axes.index(RotateOp.of_node(node).axis)
        first, second = jnp.split(full.array, 2, axis=at)
        turned = jnp.concatenate([-second, first], axis=at)
        cos, sin = (broadcast_like(t, x).over(full.axes).astype(full.array.dtype) for t in tables)
        return Named(full.array * cos + turned * sin, full.axes)

    return lifted(x, turn)


@lowering("causal")
def _causal(ctx: TraceContext, node: Node, query: Operand, key: Operand) -> Operand:
    attrs = CausalOp.of_node(node)

    def compare(queries: Array, keys: Array) -> Array:
        ahead = queries - keys
        keep = ahead >= 0
        return keep & (ahead < attrs.window) if attrs.window else keep

    return _crossed(query, key, compare)


@lowering("same_segment")
def _same_segment(ctx: TraceContext, node: Node, query: Operand, key: Operand) -> Operand:
    return _crossed(query, key, lambda queries, keys: (queries == keys) | (queries == 0))


@lowering("relative_buckets")
def _relative_buckets(ctx: TraceContext, node: Node, query: Operand, key: Operand) -> Operand:
    attrs = RelativeBucketsOp.of_node(node)
    both = attrs.bidirectional

    def compare(queries: Array, keys: Array) -> Array:
        ahead = keys - queries
        distance = jnp.abs(ahead) if both else jnp.maximum(-ahead, 0)
        starts = jnp.asarray(bucket_starts(node.attrs), distance.dtype)
        near = jnp.searchsorted(starts, distance, side="right", method="compare_all")
        near = near.astype(jnp.int32)
        if both:
            near = jnp.where(ahead > 0, near + attrs.buckets // 2, near)
        return near

    return _crossed(query, key, compare)


@lowering("signed_buckets")
def _signed_buckets(ctx: TraceContext, node: Node, query: Operand, key: Operand) -> Operand:
    attrs = SignedBucketsOp.of_node(node)
    starts = signed_starts(attrs.buckets, attrs.max_distance)

    def compare(queries: Array, keys: Array) -> Array:
        behind, bounds = queries - keys, jnp.asarray(starts, queries.dtype)
        near = jnp.searchsorted(bounds, jnp.abs(behind), side="right").astype(jnp.int32)
        return jnp.clip(attrs.buckets // 2 + jnp.sign(behind) * near, 0, attrs.buckets - 1)

    return _crossed(query, key, compare)


@lowering("alibi")
def _alibi(ctx: TraceContext, node: Node, query: Operand, key: Operand) -> Operand:
    attrs = AlibiOp.of_node(node)
    slopes = jnp.asarray(alibi_slopes(attrs.size), accumulator(ctx.dtype))

    def compare(queries: Array, keys: Array) -> Array:
        return (keys - queries)[..., None] * slopes

    return _crossed(query, key, compare, attrs.axis)


def _crossed(
    query: Operand, key: Operand, compare: Callable[[Array, Array], Array], *new: str
) -> Operand:
    """Compare every query with every key; either may be rows of experts.

    Both cannot be: their axes would be there twice.

    Args:
      query: the queries.
      key: the keys.
      compare: the function of both, which may add the axes `new`.
      new: the names of these.
    """

    def crossed(q: Named, k: Named) -> Named:
        axes = (*q.axes, *(a for a in k.axes if a not in q.axes))
        return Named(compare(q.over(axes), k.over(axes)), (*axes, *new))

    if isinstance(query, Rows):
        assert isinstance(key, Named), "one of the two is"
        return lifted(query, lambda q: crossed(q, key))
    return lifted(key, lambda k: crossed(query, k))


# Lowering of attention as one operation: laid out for a kernel, or product by product.


@lowering("attention", names_result=True)
def _attention(ctx: TraceContext, node: Node, *operands: Named) -> Named:
    attrs = AttentionOp.of_node(node)
    query, key, value, *more = operands
    extras = dict(zip(attrs.given, more, strict=True))
    sizes = (query.sizes, key.sizes, value.sizes)
    is_tracked = ctx.view.mesh is not None and not CUDNN_VARIES
    is_gspmd = ctx.interceptor is not DIRECT
    program = AttentionProgram(ctx.options.target, dtype_of(query.array).name, is_gspmd, is_tracked)
    kernel = _kernel(ctx, facts_of(*sizes, attrs, program))
    axes = AttentionAxes.of(*sizes, attrs)
    if kernel == "plain" or axes is None:
        return plain_attention(query, key, value, extras, attrs)
    rule = AttentionRule(attrs.scale, attrs.cap, bool(attrs.causal), attrs.window)
    dims = (axes.batch, axes.heads, axes.groups, axes.queries)
    keys, shared = (*dims[:2], (axes.keys,)), query.sizes | key.sizes
    arrays = AttentionArrays(
        _laid_out(query, (*dims, (axes.width,)), shared),
        _laid_out(key, (*keys, (axes.width,)), shared),
        _laid_out(value, (*keys, axes.wide), value.sizes),
        **{word: _laid_out(x, (*dims, (axes.keys,)), shared) for word, x in extras.items()},
    )
    mixed = _RUN[kernel](ctx, rule, arrays)
    axis_sizes = query.sizes | {a: value.size(a) for a in axes.wide}
    return Named(mixed.reshape([axis_sizes[a] for a in axes.result]), axes.result)


def _kernel(ctx: TraceContext, facts: AttentionFacts) -> str:
    """Return the kernel that is chosen, or forced.

    Raises:
      InputError: one is forced that does not take this attention.
    """
    forced = ctx.options.attention
    if forced == AUTO:
        return choose_attention(facts).kernel.name
    kernel = next(k for k in KERNELS if k.name == forced)
    # Splash attention runs in Pallas' interpreter elsewhere.
    there = replace(facts, platform=kernel.platform) if forced == "splash" else facts
    reason = kernel.reason(there)
    if reason is not None:
        legal = [k.name for k in KERNELS if k.reason(facts) is None]
        raise InputError(
            f"this attention cannot be lowered with attention={forced}",
            expected=f"auto, {', '.join(legal)}",
            found=reason,
        )
    return forced


_RUN: dict[str, Callable[[TraceContext, AttentionRule, AttentionArrays], Array]] = {
    "splash": lambda ctx, rule, arrays: splash_attention(
        rule, arrays, interpret=ctx.options.target != "tpu"
    ),
    "cudnn": lambda ctx, rule, arrays: cudnn_attention(rule, arrays),
    "blocks": lambda ctx, rule, arrays: block_attention(
        replace(rule, by_key=ctx.options.target == "cpu"), arrays
    ),
}
"""The kernels that take arrays, by the names of `moecc.ir.attention`."""

assert (*_RUN, "plain") == ATTENTIONS, "options name what there is"


def _laid_out(x: Named, dims: tuple[tuple[str, ...], ...], sizes: dict[str, int]) -> Array:
    """Return `x` with the axes of each of `dims` as one; with size 1 where it has none of them."""
    shape = []
    axes: list[str] = []
    for names in dims:
        present = [a for a in names if a in x.axes]
        axes += names if present else []
        shape.append(prod(sizes[a] for a in names) if present else 1)
    full = [sizes[a] for a in axes]
    return jnp.broadcast_to(x.over(tuple(axes)), full).reshape(shape)


def plain_attention(
    query: Named, key: Named, value: Named, extras: dict[str, Named], attrs: AttentionOp
) -> Named:
    """Return the averaged values, product by product; the scores are one array."""
    kind, wide = query.array.dtype, accumulator(query.array.dtype)
    products = einsum(Named(query.array.astype(wide), query.axes), key, (attrs.over,))
    axes, scores = products.axes, products.array * attrs.scale
    if attrs.cap:
        scores = attrs.cap * jnp.tanh(scores / attrs.cap)
    if "bias" in extras:
        scores = scores + extras["bias"].over(axes).astype(wide)
    for seen in _seen(Named(scores, axes), extras, attrs):
        scores = jnp.where(seen, scores, -jnp.inf)
    at, keys = axes.index(attrs.along), scores.shape[axes.index(attrs.along)]
    if "sinks" in extras:
        shape = [n if i != at else 1 for i, n in enumerate(scores.shape)]
        sinks = jnp.broadcast_to(extras["sinks"].over(axes).astype(wide), shape)
        scores = jnp.concatenate([scores, sinks], at)
    weights = jax.lax.slice_in_dim(softmax(scores, at), 0, keys, axis=at)
    return einsum(Named(weights.astype(kind), axes), value, (attrs.along,))


def _seen(scores: Named, extras: dict[str, Named], attrs: AttentionOp) -> Iterator[Array]:
    """Yield what hides keys from queries, each to be broadcast over the scores."""
    for axis in attrs.causal:
        queries, keys = (
            Named(jnp.arange(scores.size(a)), (a,)).over(scores.axes) for a in (axis, attrs.along)
        )
        seen = queries >= keys
        yield seen & (queries - keys < attrs.window) if attrs.window else seen
    if "keep" in extras:
        yield extras["keep"].over(scores.axes)
    if "query_segments" in extras:
        queries, keys = (extras[w].over(scores.axes) for w in ("query_segments", "key_segments"))
        yield (queries == keys) | (queries == 0)
