"""Lowering of every operation that is not routing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.dtypes import canonicalize_dtype

from moecc.ir.graph import Node
from moecc.types.dtypes import DTYPES
from moecc.weights.rounding import is_lossless
from moecc_backends.xla.trace.context import VALUE, Context, lowering
from moecc_backends.xla.trace.dtypes import accumulator
from moecc_backends.xla.trace.values import (
    Named,
    Operand,
    Rows,
    beside,
    lifted,
    per_row,
    with_masked_rows,
)

Array = jax.Array

_UNARY: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
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
    dtype = DTYPES[node.attrs["dtype"]]
    if not dtype.is_float:
        wanted = canonicalize_dtype(dtype.numpy)
        return elementwise(lambda v: v.astype(wanted), x)
    # A cast may round; what is computed in afterwards is a matter of the policy.
    narrow = ctx.dtype if is_lossless(node.operands[0].type.dtype, dtype) else dtype.numpy
    if np.dtype(narrow).itemsize > np.dtype(ctx.dtype).itemsize:
        narrow = ctx.dtype
    return elementwise(lambda v: v.astype(narrow).astype(ctx.dtype), x)


@lowering("select")
def _select(ctx: Context, node: Node, condition: Operand, a: Operand, b: Operand) -> Operand:
    return elementwise(jnp.where, condition, a, b)


@lowering("mask")
def _mask(ctx: Context, node: Node, x: Operand, keep: Operand) -> Operand:
    fill = node.attrs["fill"]
    return elementwise(lambda v, k: jnp.where(k, v, jnp.asarray(fill, v.dtype)), x, keep)


@lowering("constant")
def _constant(ctx: Context, node: Node) -> Operand:
    declared = DTYPES[node.attrs["dtype"]]
    dtype = ctx.dtype if declared.is_float else canonicalize_dtype(declared.numpy)
    return Named(jnp.asarray(node.attrs["value"], dtype), ())


@lowering("rename")
def _rename(ctx: Context, node: Node, x: Operand) -> Operand:
    old, new = node.attrs["axis"], node.attrs["to"]
    axes = tuple(new if a == old else a for a in x.axes)
    return x.with_array(x.array, axes) if isinstance(x, Rows) else Named(x.array, axes)


@lowering("split")
def _split(ctx: Context, node: Node, x: Operand) -> Operand:
    names = tuple(n for n, _ in node.attrs["into"])
    sizes = tuple(s for _, s in ctx.local.attrs(node)["into"])

    def cut(full: Named) -> Named:
        at, shape = full.axes.index(node.attrs["axis"]), full.array.shape
        array = full.array.reshape(*shape[:at], *sizes, *shape[at + 1 :])
        return Named(array, (*full.axes[:at], *names, *full.axes[at + 1 :]))

    return lifted(x, cut)


@lowering("merge")
def _merge(ctx: Context, node: Node, x: Operand) -> Operand:
    parts: tuple[str, ...] = node.attrs["axes"]

    def join(full: Named) -> Named:
        at = full.axes.index(parts[0])
        before = tuple(a for a in full.axes[:at] if a not in parts)
        after = tuple(a for a in full.axes[at:] if a not in parts)
        moved = full.to((*before, *parts, *after))
        sizes = [full.size(a) for a in parts]
        outer, inner = ([full.size(a) for a in axes] for axes in (before, after))
        array = moved.array.reshape(*outer, prod(sizes), *inner)
        return Named(array, (*before, node.attrs["into"], *after))

    return lifted(x, join)


@lowering("broadcast")
def _broadcast(ctx: Context, node: Node, x: Operand, like: Operand) -> Operand:
    def spread(a: Array, b: Array) -> Array:
        return jnp.broadcast_to(a.astype(_kind_beside(a, b, ctx)), b.shape)

    return elementwise(spread, x, like)


def _kind_beside(a: Array, b: Array, ctx: Context) -> Any:
    """Return the type of `a` spread over `b`: as wide as `b`, and not narrow where it counts.

    A 1 for each choice is summed to a count, which a narrow type would round.
    """
    if not jnp.issubdtype(a.dtype, jnp.floating):
        return a.dtype
    is_float = jnp.issubdtype(b.dtype, jnp.floating)
    return jnp.promote_types(a.dtype, b.dtype if is_float else accumulator(ctx.dtype))


@lowering("slice")
def _slice(ctx: Context, node: Node, x: Operand) -> Operand:
    def cut(full: Named) -> Named:
        at = full.axes.index(node.attrs["axis"])
        start, stop = node.attrs["start"], node.attrs["stop"]
        return Named(jax.lax.slice_in_dim(full.array, start, stop, axis=at), full.axes)

    return lifted(x, cut)


@lowering("positions")
def _positions(ctx: Context, node: Node, like: Operand | None) -> Operand:
    axis = node.result.type.axes[0]
    if isinstance(axis.size, int):
        size = axis.size // ctx.local.parts(axis)
    else:
        size = _size(ctx, node, like, axis.name)
    own = jnp.arange(size, dtype=jnp.int32) + ctx.local.offset(axis, size)
    return Named(own, (axis.name,))


def _size(ctx: Context, node: Node, like: Operand | None, axis: str) -> int:
    """Return the size of `axis`, which rows have or their routing knows."""
    if like is None:
        return ctx.put_off[node.operands[0]].routing.groups
    if isinstance(like, Named):
        return like.size(axis)
    return like.packing.routing.groups if axis == "group" else like.inner().size(axis)


@lowering("embedding")
def _embedding(ctx: Context, node: Node, table: Operand, ids: Operand) -> Operand:
    axis = node.attrs["axis"]
    declared = node.operands[0].type[axis]

    def pick(rows: Named, index: Named) -> Named:
        rest = tuple(a for a in rows.axes if a != axis)
        own = rows.to((axis, *rest)).array
        if ctx.local.parts(declared) == 1:
            picked = jnp.take(own, index.array, axis=0)
        else:
            picked = _of_own_rows(own, index.array - ctx.local.offset(declared, len(own)))
        return Named(picked, (*index.axes, *rest))

    # Either may be packed rows, but not both: their axes would be there twice.
    if isinstance(ids, Rows):
        assert isinstance(table, Named), "one of the two is"
        picked = lifted(ids, lambda index: pick(table, index))
        assert isinstance(picked, Rows), "rows stay rows"
        return with_masked_rows(picked)
    return lifted(table, lambda rows: pick(rows, ids))


def _of_own_rows(rows: Array, index: Array) -> Array:
    """Return rows of the own part of a table, and zeros for those of other parts."""
    is_own = (index >= 0) & (index < len(rows))
    picked = jnp.take(rows, jnp.where(is_own, index, 0), axis=0)
    return jnp.where(is_own.reshape(*index.shape, *[1] * (rows.ndim - 1)), picked, 0)


@lowering("one_hot")
def _one_hot(ctx: Context, node: Node, ids: Operand) -> Operand:
    ((name, size),) = node.attrs["into"]
    # Counts are made of these, which a narrow type would round.
    kind = accumulator(ctx.dtype)
    return lifted(ids, lambda i: Named(jax.nn.one_hot(i.array, size, dtype=kind), (*i.axes, name)))


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
    function, axes = _REDUCTIONS[node.op.name], node.attrs["axes"]

    def along(full: Named) -> Named:
        at = tuple(full.axes.index(a) for a in axes)
        result = function(full.array.astype(_wide(full.array)), axis=at)
        if node.op.name == "mean":
            # The parts of a mean add up to it; they are of one size.
            given = node.operands[0].type
            result = result / prod(ctx.local.parts(given[a]) for a in axes)
        rest = tuple(a for a in full.axes if a not in axes)
        return Named(result.astype(full.array.dtype), rest)

    return lifted(x, along)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def softmax(x: Array, axis: int) -> Array:
    """Return the softmax along `axis`, which is zero where all of `x` is −∞.

    It is computed in float32 at least, and has the type of `x`.  Its derivative reads the result.
    """
    # −∞ − (−∞) is undefined, and any finite number serves to shift by.
    wide = x.astype(_wide(x))
    top = jnp.max(wide, axis, keepdims=True)
    parts = jnp.exp(wide - jnp.where(jnp.isneginf(top), 0, top))
    total = jnp.sum(parts, axis, keepdims=True)
    return (parts / jnp.where(total == 0, 1, total)).astype(x.dtype)


@softmax.defjvp
def _softmax_jvp(axis: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # Named here, so that the derivative reads the very array that is kept.
    result: Array = checkpoint_name(softmax(primals[0], axis), VALUE)  # type: ignore[no-untyped-call]
    wide, tangent = (v.astype(_wide(v)) for v in (result, tangents[0]))
    change = wide * (tangent - jnp.sum(wide * tangent, axis, keepdims=True))
    return result, change.astype(result.dtype)


@lowering("softmax")
def _softmax(ctx: Context, node: Node, x: Operand) -> Operand:
    def along(full: Named) -> Named:
        return Named(softmax(full.array, full.axes.index(node.attrs["axis"])), full.axes)

    return lifted(x, along)


def _unit(full: Named, node: Node, *, centre: bool) -> Array:
    """Return the array in wide precision divided by its root mean square, then narrowed."""
    at = full.axes.index(node.attrs["axis"])
    wide = full.array.astype(_wide(full.array))
    if centre:
        wide = wide - wide.mean(at, keepdims=True)
    scaled = wide * jax.lax.rsqrt(jnp.mean(wide * wide, at, keepdims=True) + node.attrs["eps"])
    return scaled.astype(full.array.dtype)


@lowering("rms_norm")
def _rms_norm(ctx: Context, node: Node, x: Operand, scale: Named) -> Operand:
    def norm(full: Named) -> Named:
        factor = beside(scale, x).over(full.axes)
        return Named(_unit(full, node, centre=False) * factor, full.axes)

    return lifted(x, norm)


@lowering("layer_norm")
def _layer_norm(ctx: Context, node: Node, x: Operand, scale: Named, bias: Named) -> Operand:
    def norm(full: Named) -> Named:
        unit = _unit(full, node, centre=True)
        factor, shift = (beside(v, x).over(full.axes) for v in (scale, bias))
        return Named(unit * factor + shift, full.axes)

    return lifted(x, norm)
