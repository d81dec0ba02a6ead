"""Lowering of rotary positions and causal masks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from moecc.ir.graph import Node
from moecc.ir.table.attention import bucket_starts
from moecc_backends.reference.attention import frequencies
from moecc_backends.xla.context import Context, lowering
from moecc_backends.xla.dtypes import accumulator
from moecc_backends.xla.named import Named, Operand, lifted


@lowering("rope")
def _rope(ctx: Context, node: Node, positions: Named) -> tuple[Operand, ...]:
    attrs = node.attrs
    wide = accumulator(ctx.dtype)
    half = positions.array.astype(wide)[..., None] * _rates(attrs, positions.array, wide)
    angles = jnp.concatenate([half, half], axis=-1)
    axes = (*positions.axes, attrs["axis"])
    factor = attrs["attention_factor"]
    return Named(jnp.cos(angles) * factor, axes), Named(jnp.sin(angles) * factor, axes)


def _rates(attrs: dict[str, Any], positions: jax.Array, dtype: Any) -> jax.Array:
    """Return the angle per position of each pair of entries, ``[size / 2]``."""
    if attrs["scaling"] != "dynamic":
        return jnp.asarray(frequencies(attrs["size"], 0, attrs), dtype)
    # The number of positions is known at run time only (NTK scaling of bloc97 and emozilla).
    size, factor, context = attrs["size"], attrs["factor"], attrs["original_context"]
    length = jnp.max(positions, initial=0).astype(dtype) + 1
    grown = factor * jnp.maximum(length, context) / context - (factor - 1)
    theta = attrs["theta"] * grown ** (size / (size - 2))
    rates: jax.Array = theta ** -(jnp.arange(0, size, 2, dtype=dtype) / size)
    return rates


@lowering("rotate", rows=True)
def _rotate(ctx: Context, node: Node, x: Operand, cos: Named, sin: Named) -> Operand:
    def turn(full: Named) -> Named:
        at = full.axes.index(node.attrs["axis"])
        first, second = jnp.split(full.array, 2, axis=at)
        turned = jnp.concatenate([-second, first], axis=at)
        c, s = (t.over(full.axes).astype(full.array.dtype) for t in (cos, sin))
        return Named(full.array * c + turned * s, full.axes)

    return lifted(x, turn)


@lowering("causal")
def _causal(ctx: Context, node: Node, query: Named, key: Named) -> Operand:
    axes = (*query.axes, *key.axes)
    ahead = query.over(axes) - key.over(axes)
    keep = ahead >= 0
    if node.attrs["window"]:
        keep &= ahead < node.attrs["window"]
    return Named(keep, axes)


@lowering("relative_buckets")
def _relative_buckets(ctx: Context, node: Node, query: Named, key: Named) -> Operand:
    axes = (*query.axes, *key.axes)
    ahead = key.over(axes) - query.over(axes)
    both: bool = node.attrs["bidirectional"]
    distance = jnp.abs(ahead) if both else jnp.maximum(-ahead, 0)
    starts = jnp.asarray(bucket_starts(node.attrs), distance.dtype)
    near = jnp.searchsorted(starts, distance, side="right", method="compare_all")
    near = near.astype(jnp.int32)
    if both:
        near = jnp.where(ahead > 0, near + node.attrs["buckets"] // 2, near)
    return Named(near, axes)
