"""Lowering of every operation that is not routing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moecc.ir.dtypes import DTYPES
from moecc.ir.graph import Node
from moecc.ir.table.attention import bucket_starts
from moecc_backends.xla.context import Context, lowering
from moecc_backends.xla.dtypes import accumulator
from moecc_backends.xla.named import Named, Operand, Rows, per_row

Array = jax.Array

_UNARY: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": lambda x: jnp.maximum(x, 0),
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "exp": jnp.exp,
    "log": jnp.log,
    "square": jnp.square,
    "rsqrt": jax.lax.rsqrt,
    "normal_cdf": jax.scipy.special.ndtr,
    "neg": jnp.negative,
    "stop_gradient": jax.lax.stop_gradient,
}

_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": jnp.add,
    "sub": jnp.subtract,
    "mul": jnp.multiply,
    "div": jnp.divide,
    "maximum": jnp.maximum,
    "minimum": jnp.minimum,
    "less": jnp.less,
    "equal": jnp.equal,
}


def elementwise(function: Callable[..., Array], *operands: Operand) -> Operand:
    """Apply `function` to operands broadcast over the axes of the one that has them all."""
    packing = next((x.packing for x in operands if isinstance(x, Rows)), None)
    named = [x if isinstance(x, Named) else x.inner() for x in operands]
    if packing is not None:
        named = [per_row(x, packing) for x in operands]
    axes = max((x.axes for x in named), key=len)
    result = function(*(x.over(axes) for x in named))
    if packing is None:
        return Named(result, axes)
    inner = tuple(a for a in axes if a != "rows")
    return Rows(Named(result, axes).to(("rows", *inner)).array, inner, packing)


@lowering(*_UNARY)
def _unary(ctx: Context, node: Node, x: Operand) -> Operand:
    return elementwise(_UNARY[node.op.name], x)


@lowering(*_BINARY)
def _binary(ctx: Context, node: Node, a: Operand, b: Operand) -> Operand:
    return elementwise(_BINARY[node.op.name], a, b)


@lowering("scale")
def _scale(ctx: Context, node: Node, x: Operand) -> Operand:
    return elementwise(lambda v: v * jnp.asarray(node.attrs["by"], v.dtype), x)


@lowering("cast")
def _cast(ctx: Context, node: Node, x: Operand) -> Operand:
    dtype = DTYPES[node.attrs["dtype"]].numpy
    return elementwise(lambda v: v.astype(dtype), x)


@lowering("select")
def _select(ctx: Context, node: Node, condition: Operand, a: Operand, b: Operand) -> Operand:
    return elementwise(jnp.where, condition, a, b)


@lowering("mask")
def _mask(ctx: Context, node: Node, x: Operand, keep: Operand) -> Operand:
    fill = node.attrs["fill"]
    return elementwise(lambda v, k: jnp.where(k, v, jnp.asarray(fill, v.dtype)), x, keep)


@lowering("constant")
def _constant(ctx: Context, node: Node) -> Operand:
    return Named(jnp.asarray(node.attrs["value"], DTYPES[node.attrs["dtype"]].numpy), ())


@lowering("rename")
def _rename(ctx: Context, node: Node, x: Operand) -> Operand:
    old, new = node.attrs["axis"], node.attrs["to"]
    axes = tuple(new if a == old else a for a in x.axes)
    return x.with_array(x.array, axes) if isinstance(x, Rows) else Named(x.array, axes)


def _reshaped(x: Operand, axes: tuple[str, ...], shape: tuple[int, ...]) -> Operand:
    if isinstance(x, Rows):
        return x.with_array(x.array.reshape(x.array.shape[0], *shape), axes)
    return Named(x.array.reshape(shape), axes)


def _inner_shape(x: Operand) -> tuple[int, ...]:
    return x.array.shape[1:] if isinstance(x, Rows) else x.array.shape


@lowering("split")
def _split(ctx: Context, node: Node, x: Operand) -> Operand:
    at = x.axes.index(node.attrs["axis"])
    names = tuple(n for n, _ in node.attrs["into"])
    sizes = tuple(s for _, s in node.attrs["into"])
    shape = _inner_shape(x)
    return _reshaped(
        x, (*x.axes[:at], *names, *x.axes[at + 1 :]), (*shape[:at], *sizes, *shape[at + 1 :])
    )


@lowering("merge")
def _merge(ctx: Context, node: Node, x: Operand) -> Operand:
    parts: tuple[str, ...] = node.attrs["axes"]
    at = x.axes.index(parts[0])
    rest = [a for a in x.axes if a not in parts]
    # The first of the axes stays where it is, and the others move behind it.
    before = [a for a in x.axes[:at] if a in rest]
    order = (*before, *parts, *(a for a in rest if a not in before))
    moved = x.inner().to(("rows", *order)) if isinstance(x, Rows) else x.to(order)
    shape = moved.array.shape[1:] if isinstance(x, Rows) else moved.array.shape
    n = len(before)
    size = int(np.prod(shape[n : n + len(parts)]))
    axes = (*before, node.attrs["into"], *order[n + len(parts) :])
    whole = (*shape[:n], size, *shape[n + len(parts) :])
    source: Operand = x.with_array(moved.array, order) if isinstance(x, Rows) else moved
    return _reshaped(source, axes, whole)


@lowering("broadcast")
def _broadcast(ctx: Context, node: Node, x: Operand, like: Operand) -> Operand:
    return elementwise(lambda a, b: jnp.broadcast_to(a, b.shape), x, like)


@lowering("slice")
def _slice(ctx: Context, node: Node, x: Operand) -> Operand:
    full = x.inner() if isinstance(x, Rows) else x
    at = full.axes.index(node.attrs["axis"])
    part = jax.lax.slice_in_dim(full.array, node.attrs["start"], node.attrs["stop"], axis=at)
    return x.with_array(part) if isinstance(x, Rows) else Named(part, x.axes)


@lowering("positions")
def _positions(ctx: Context, node: Node, like: Operand) -> Operand:
    axis = node.attrs["axis"]
    full = like.inner() if isinstance(like, Rows) else like
    return Named(jnp.arange(full.size(axis), dtype=jnp.int32), (axis,))


@lowering("embedding")
def _embedding(ctx: Context, node: Node, table: Named, ids: Named) -> Operand:
    axis = node.attrs["axis"]
    rest = tuple(a for a in table.axes if a != axis)
    rows = jnp.take(table.to((axis, *rest)).array, ids.array, axis=0)
    return Named(rows, (*ids.axes, *rest))


@lowering("one_hot")
def _one_hot(ctx: Context, node: Node, ids: Named) -> Operand:
    ((name, size),) = node.attrs["into"]
    # Counts are made of these, which a narrow type would round.
    return Named(jax.nn.one_hot(ids.array, size, dtype=accumulator(ctx.dtype)), (*ids.axes, name))


def _along(function: Callable[..., Array], x: Operand, axes: tuple[str, ...]) -> Operand:
    """Reduce `x` over `axes` in float32."""
    full = x.inner() if isinstance(x, Rows) else x
    at = tuple(full.axes.index(a) for a in axes)
    result = function(full.array.astype(_wide(full.array)), axis=at).astype(full.array.dtype)
    rest = tuple(a for a in x.axes if a not in axes)
    return x.with_array(result, rest) if isinstance(x, Rows) else Named(result, rest)


def _wide(array: Array) -> Any:
    """Return the type to normalise in: at least float32 (selective precision, ST-MoE §3.3)."""
    return jnp.promote_types(array.dtype, jnp.float32)


_REDUCTIONS: dict[str, Callable[..., Array]] = {
    "sum": jnp.sum,
    "mean": jnp.mean,
    "max": jnp.max,
    "logsumexp": jax.nn.logsumexp,
}


@lowering(*_REDUCTIONS)
def _reduce(ctx: Context, node: Node, x: Operand) -> Operand:
    return _along(_REDUCTIONS[node.op.name], x, node.attrs["axes"])


@lowering("softmax")
def _softmax(ctx: Context, node: Node, x: Operand) -> Operand:
    full = x.inner() if isinstance(x, Rows) else x
    at = full.axes.index(node.attrs["axis"])
    result = jax.nn.softmax(full.array.astype(_wide(full.array)), axis=at).astype(full.array.dtype)
    return x.with_array(result) if isinstance(x, Rows) else Named(result, x.axes)


def _normalise(x: Operand, axis: str, eps: float, centre: bool) -> tuple[Named, Named]:
    """Return `x` in wide precision divided by its root mean square, and the narrow original."""
    full = x.inner() if isinstance(x, Rows) else x
    at = full.axes.index(axis)
    wide = full.array.astype(_wide(full.array))
    if centre:
        wide = wide - wide.mean(at, keepdims=True)
    scaled = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=at, keepdims=True) + eps)
    return Named(scaled, full.axes), full


@lowering("rms_norm")
def _rms_norm(ctx: Context, node: Node, x: Operand, scale: Named) -> Operand:
    normal, full = _normalise(x, node.attrs["axis"], node.attrs["eps"], centre=False)
    narrow = normal.array.astype(full.array.dtype) * scale.over(full.axes)
    return x.with_array(narrow) if isinstance(x, Rows) else Named(narrow, x.axes)


@lowering("layer_norm")
def _layer_norm(ctx: Context, node: Node, x: Operand, scale: Named, bias: Named) -> Operand:
    normal, full = _normalise(x, node.attrs["axis"], node.attrs["eps"], centre=True)
    narrow = normal.array.astype(full.array.dtype) * scale.over(full.axes) + bias.over(full.axes)
    return x.with_array(narrow) if isinstance(x, Rows) else Named(narrow, x.axes)


@lowering("rotate")
def _rotate(ctx: Context, node: Node, x: Named, cos: Named, sin: Named) -> Operand:
    at = x.axes.index(node.attrs["axis"])
    first, second = jnp.split(x.array, 2, axis=at)
    turned = jnp.concatenate([-second, first], axis=at)
    tables = (t.over(x.axes).astype(x.array.dtype) for t in (cos, sin))
    return Named(x.array * next(tables) + turned * next(tables), x.axes)


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
