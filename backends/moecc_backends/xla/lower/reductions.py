"""Lowering of reductions along axes, softmax and norms, in float32 at least."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moecc.ir.attributes import MeanAttrs, NormAttrs, ReductionAttrs, SoftmaxAttrs
from moecc.ir.graph import Node
from moecc_backends.xla.trace.arrays import broadcast_like, lifted
from moecc_backends.xla.trace.context import VALUE, Context, lowering
from moecc_backends.xla.trace.typed_jax import named
from moecc_backends.xla.trace.values import Named, Operand

Array = jax.Array


def _wide(array: Array) -> DTypeLike:
    """Return the type to normalise in: at least float32 (selective precision, ST-MoE §3.3)."""
    return jnp.promote_types(array.dtype, jnp.float32)


_REDUCTIONS: dict[str, Callable[..., Array]] = {
    "sum": jnp.sum,
    "max": jnp.max,
    "logsumexp": jax.nn.logsumexp,
}


def _reduce(
    function: Callable[..., Array], ctx: Context, node: Node, x: Operand, *, parts: int = 1
) -> Operand:
    axes = ReductionAttrs.of_node(node).axes

    def along(full: Named) -> Named:
        at = tuple(full.axes.index(a) for a in axes)
        result = function(full.array.astype(_wide(full.array)), axis=at)
        if parts != 1:
            result = result / parts
        rest = tuple(a for a in full.axes if a not in axes)
        return Named(result.astype(full.array.dtype), rest)

    return lifted(x, along)


for _name, _function in _REDUCTIONS.items():
    lowering(_name)(partial(_reduce, _function))


@lowering("mean")
def _mean(ctx: Context, node: Node, x: Operand) -> Operand:
    # The means of the shards add up to that of the whole; they are of one size.
    given = node.operands[0].type
    parts = prod(ctx.view.shard_count(given[a]) for a in MeanAttrs.of_node(node).axes)
    return _reduce(jnp.mean, ctx, node, x, parts=parts)


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
    result = named(softmax(primals[0], axis), VALUE)
    wide, tangent = (v.astype(_wide(v)) for v in (result, tangents[0]))
    change = wide * (tangent - jnp.sum(wide * tangent, axis, keepdims=True))
    return result, change.astype(result.dtype)


@lowering("softmax", names_result=True)
def _softmax(ctx: Context, node: Node, x: Operand) -> Operand:
    axis = SoftmaxAttrs.of_node(node).axis

    def along(full: Named) -> Named:
        return Named(softmax(full.array, full.axes.index(axis)), full.axes)

    return lifted(x, along)


def _unit(full: Named, node: Node, *, centre: bool) -> Array:
    """Return the array in wide precision divided by its root mean square, then narrowed."""
    attrs = NormAttrs.of_node(node)
    at = full.axes.index(attrs.axis)
    wide = full.array.astype(_wide(full.array))
    if centre:
        wide = wide - wide.mean(at, keepdims=True)
    scaled = wide * jax.lax.rsqrt(jnp.mean(wide * wide, at, keepdims=True) + attrs.eps)
    return scaled.astype(full.array.dtype)


@lowering("rms_norm")
def _rms_norm(ctx: Context, node: Node, x: Operand, scale: Named) -> Operand:
    def norm(full: Named) -> Named:
        factor = broadcast_like(scale, x).over(full.axes)
        return Named(_unit(full, node, centre=False) * factor, full.axes)

    return lifted(x, norm)


@lowering("layer_norm")
def _layer_norm(ctx: Context, node: Node, x: Operand, scale: Named, bias: Named) -> Operand:
    def norm(full: Named) -> Named:
        unit = _unit(full, node, centre=True)
        factor, shift = (broadcast_like(v, x).over(full.axes) for v in (scale, bias))
        return Named(unit * factor + shift, full.axes)

    return lifted(x, norm)
