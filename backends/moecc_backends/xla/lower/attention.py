"""Lowering of rotary positions and causal masks."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from moecc.ir.attributes import CausalAttrs, RelativeBucketsAttrs, RopeAttrs, RotateAttrs
from moecc.ir.graph import Node
from moecc.ir.table.attention import bucket_starts
from moecc_backends.reference.attention import frequencies
from moecc_backends.xla.trace.arrays import broadcast_like, lifted, lifted_all
from moecc_backends.xla.trace.context import Context, lowering
from moecc_backends.xla.trace.dtypes import accumulator
from moecc_backends.xla.trace.values import Named, Operand, Rows


@lowering("rope")
def _rope(ctx: Context, node: Node, positions: Operand) -> tuple[Operand, ...]:
    attrs = RopeAttrs.of_node(node)
    wide = accumulator(ctx.dtype)

    def tables(full: Named) -> tuple[Named, Named]:
        half = full.array.astype(wide)[..., None] * _rates(attrs, full.array, wide)
        axes, factor = (*full.axes, attrs.axis), attrs.attention_factor
        made = (_twice(f(half) * factor, ctx.options.target) for f in (jnp.cos, jnp.sin))
        cos, sin = (Named(table, axes) for table in made)
        return cos, sin

    return lifted_all(positions, tables)


def _twice(half: jax.Array, target: str) -> jax.Array:
    """Return ``[…, size]``, the entries of ``[…, size / 2]`` twice.

    On a CPU by a product with ones and zeros, which is exact: XLA computes a cosine within the
    loops of its users, for every head and sequence again, unless a product lies between.
    """
    if target != "cpu":
        return jnp.concatenate([half, half], axis=-1)
    unit = np.tile(np.eye(half.shape[-1], dtype=half.dtype), 2)
    return jnp.matmul(half, unit, precision="highest")


def _rates(attrs: RopeAttrs, positions: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Return the angle per position of each pair of entries, ``[size / 2]``."""
    if attrs.scaling == "longrope":
        # The number of positions is known at run time only.
        context = attrs.original_context
        short, long = (frequencies(attrs.size, n, attrs) for n in (context, context + 1))
        is_long = jnp.max(positions, initial=0) >= context
        return jnp.where(is_long, jnp.asarray(long, dtype), jnp.asarray(short, dtype))
    if attrs.scaling != "dynamic":
        return jnp.asarray(frequencies(attrs.size, 0, attrs), dtype)
    # The number of positions is known at run time only (NTK scaling of bloc97 and emozilla).
    size, factor, context = attrs.size, attrs.factor, attrs.original_context
    length = jnp.max(positions, initial=0).astype(dtype) + 1
    grown = factor * jnp.maximum(length, context) / context - (factor - 1)
    theta = attrs.theta * grown ** (size / (size - 2))
    rates: jax.Array = theta ** -(jnp.arange(0, size, 2, dtype=dtype) / size)
    return rates


@lowering("rotate")
def _rotate(ctx: Context, node: Node, x: Operand, *tables: Operand) -> Operand:
    def turn(full: Named) -> Named:
        at = full.axes.index(RotateAttrs.of_node(node).axis)
        first, second = jnp.split(full.array, 2, axis=at)
        turned = jnp.concatenate([-second, first], axis=at)
        cos, sin = (broadcast_like(t, x).over(full.axes).astype(full.array.dtype) for t in tables)
        return Named(full.array * cos + turned * sin, full.axes)

    return lifted(x, turn)


@lowering("causal")
def _causal(ctx: Context, node: Node, query: Operand, key: Operand) -> Operand:
    attrs = CausalAttrs.of_node(node)

    def compare(q: Named, k: Named) -> Named:
        axes = _both(q, k)
        ahead = q.over(axes) - k.over(axes)
        keep = ahead >= 0
        if attrs.window:
            keep &= ahead < attrs.window
        return Named(keep, axes)

    return _crossed(query, key, compare)


@lowering("same_segment")
def _same_segment(ctx: Context, node: Node, query: Operand, key: Operand) -> Operand:
    def compare(q: Named, k: Named) -> Named:
        axes = _both(q, k)
        queries = q.over(axes)
        return Named((queries == k.over(axes)) | (queries == 0), axes)

    return _crossed(query, key, compare)


@lowering("relative_buckets")
def _relative_buckets(ctx: Context, node: Node, query: Operand, key: Operand) -> Operand:
    attrs = RelativeBucketsAttrs.of_node(node)
    both = attrs.bidirectional

    def compare(q: Named, k: Named) -> Named:
        axes = _both(q, k)
        ahead = k.over(axes) - q.over(axes)
        distance = jnp.abs(ahead) if both else jnp.maximum(-ahead, 0)
        starts = jnp.asarray(bucket_starts(node.attrs), distance.dtype)
        near = jnp.searchsorted(starts, distance, side="right", method="compare_all")
        near = near.astype(jnp.int32)
        if both:
            near = jnp.where(ahead > 0, near + attrs.buckets // 2, near)
        return Named(near, axes)

    return _crossed(query, key, compare)


def _both(q: Named, k: Named) -> tuple[str, ...]:
    """Return the axes of queries and keys, each once."""
    return (*q.axes, *(a for a in k.axes if a not in q.axes))


def _crossed(query: Operand, key: Operand, compare: Callable[[Named, Named], Named]) -> Operand:
    """Compare every query with every key; either may be rows of experts.

    Both cannot be: their axes would be there twice.
    """
    if isinstance(query, Rows):
        assert isinstance(key, Named), "one of the two is"
        return lifted(query, lambda q: compare(q, key))
    return lifted(key, lambda k: compare(query, k))
