"""Lowering of contractions: an einsum, or a product of each expert's rows with its weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from moecc.ir.graph import Node, Value
from moecc.ir.ops.contraction import ContractOp, ConvolveOp, MeanOp, NormOp, ReductionOp, SoftmaxOp
from moecc_backends.xla.kernels.grouped_matmul import rows_times, slot_matmul
from moecc_backends.xla.trace.context import DIRECT, VALUE, TraceContext, lowering, lowering_along
from moecc_backends.xla.trace.values import (
    SLOT_AXES,
    Named,
    Names,
    Operand,
    Rows,
    accumulator,
    broadcast_like,
    einsum,
    lifted,
    product_type,
)

# Selective precision: routers compute in float32 (ST-MoE, §3.3), as their products ask for.
#
# The one module that reads the attribute ``precision`` of products.


def is_precise(node: Node) -> bool:
    """Return whether `node` is a product that is computed in float32 at least."""
    return node.attrs.get("precision") == "f32"


def is_precise_param(value: Value) -> bool:
    """Return whether all products with the parameter `value` are precise; it stays float32."""

    def only_precise(value: Value) -> bool:
        return all(
            is_precise(user)
            if user.body is None
            else all(
                only_precise(inner)
                for outer, inner in zip(user.operands, user.body.inputs.values(), strict=True)
                if outer is value
            )
            for user in value.users
        )

    return value.is_param and only_precise(value)


@lowering("contract")
def _contract(ctx: TraceContext, node: Node, x: Operand, w: Operand) -> Operand:
    over: Names = ContractOp.of_node(node).over
    if isinstance(x, Rows):
        return _rows_times(ctx, x, w, over)
    if isinstance(w, Rows):
        return _rows_times(ctx, w, x, over)
    if is_precise(node):
        wide = accumulator(ctx.dtype)
        x, w = (Named(v.array.astype(wide), v.axes) for v in (x, w))
    shared, target = set(x.axes) & set(w.axes), ctx.options.target
    kind = product_type(x.array.dtype, target)
    if len(over) != 1:
        return einsum(x, w, over, kind)
    is_matrix_of_each = len(w.axes) == 3 and w.axes[0] == "expert" and shared == {"expert", *over}
    if is_matrix_of_each and x.axes == (*SLOT_AXES, *over):
        experts, *slots, width = x.array.shape
        rows = x.array.reshape(experts, prod(slots), width)
        product = slot_matmul(rows, w.array.astype(rows.dtype), w.axes.index(over[0]), kind)
        (column,) = (a for a in w.axes[1:] if a not in over)
        return Named(product.reshape(experts, *slots, -1), (*SLOT_AXES, column))
    is_matrix = len(w.axes) == 2 and shared == set(over)
    is_rows = len(x.axes) > 2 and x.axes[-1:] == over
    if (
        (is_matrix and is_rows and target == "cpu")
        and ctx.interceptor is DIRECT
        and x.array.dtype == w.array.dtype == kind
    ):
        *lead, width = x.array.shape
        product = rows_times(x.array.reshape(prod(lead), width), w.array, w.axes.index(over[0]))
        (column,) = (a for a in w.axes if a not in over)
        return Named(product.reshape(*lead, product.shape[-1]), (*x.axes[:-1], column))
    return einsum(x, w, over, kind)


def _rows_times(ctx: TraceContext, x: Rows, w: Operand, over: Names) -> Operand:
    """Multiply rows with the weights of their experts, or with what all of them share."""
    if isinstance(w, Rows):
        return x.of(einsum(x.inner(), w.inner(), over))
    if not {"expert", "group"} & set(w.axes):
        x = x if x.are_tokens else x.padded(0, 0)
        return x.of(einsum(x.inner(), w, over)).padded(None, 0)
    return x.layout.matmul(x, w, over, product_type(x.array.dtype, ctx.options.target))


# Lowering of convolutions to XLA's, after the batch axes have been made one.


@lowering("convolve")
def _convolve(ctx: TraceContext, node: Node, x: Operand, w: Operand) -> Operand:
    attrs = ConvolveOp.of_node(node)
    assert isinstance(w, Named), "the type rule refuses ragged weights"
    over, along, taps = attrs.over, attrs.along, attrs.taps
    # XLA has one axis each for the batch, for what is summed, and for what is made.
    features = tuple(n for n in w.axes if n not in (*over, *taps))
    right = w.to((*features, *over, *taps)).array
    sums, out_features = (prod(map(w.size, axes)) for axes in (over, features))
    kernel = right.reshape(out_features, sums, *map(w.size, taps))

    def windows(full: Named) -> Named:
        batch = tuple(n for n in full.axes if n not in (*over, *along))
        left = full.to((*batch, *over, *along)).array
        spread = left.reshape(prod(map(full.size, batch)), sums, *map(full.size, along))
        out: Array = jax.lax.conv_general_dilated(
            spread,
            kernel.astype(spread.dtype),
            window_strides=(attrs.stride,) * len(along),
            padding=((attrs.padding, attrs.padding),) * len(along),
            preferred_element_type=product_type(kernel.dtype, ctx.options.target),
        )
        sizes = (*map(full.size, batch), *map(w.size, features), *out.shape[2:])
        split = out.astype(full.array.dtype).reshape(sizes)
        order = [n for n in full.axes if n not in over] + list(features)
        return Named(split, (*batch, *features, *along)).to(tuple(order))

    return lifted(x, windows)


# Lowering of reductions along axes, softmax and norms, in float32 at least.


def _reduce(
    function: Callable[..., Array], ctx: TraceContext, node: Node, x: Named, parts: int = 1
) -> Named:
    axes = ReductionOp.of_node(node).axes
    at = tuple(x.axes.index(a) for a in axes)
    # Selective precision: float32 at least (ST-MoE §3.3).
    result = function(x.array.astype(accumulator(x.array.dtype)), axis=at)
    if parts != 1:
        result = result / parts
    return Named(result.astype(x.array.dtype), tuple(a for a in x.axes if a not in axes))


for _name, _function in (("sum", jnp.sum), ("max", jnp.max), ("logsumexp", jax.nn.logsumexp)):
    lowering_along(_name)(partial(_reduce, _function))


@lowering_along("mean")
def _mean(ctx: TraceContext, node: Node, x: Named) -> Named:
    # The means of the shards add up to that of the whole; they are of one size.
    type = node.operands[0].type
    parts = prod(ctx.view.shard_count(type[a]) for a in MeanOp.of_node(node).axes)
    return _reduce(jnp.mean, ctx, node, x, parts)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def softmax(x: Array, axis: int) -> Array:
    """Return the softmax along `axis`, which is zero where all of `x` is −∞.

    It is computed in float32 at least, and has the type of `x`.  Its derivative reads the result.
    """
    # −∞ − (−∞) is undefined, and any finite number serves to shift by.
    wide = x.astype(accumulator(x.dtype))
    top = jnp.max(wide, axis, keepdims=True)
    parts = jnp.exp(wide - jnp.where(jnp.isneginf(top), 0, top))
    total = jnp.sum(parts, axis, keepdims=True)
    return (parts / jnp.where(total == 0, 1, total)).astype(x.dtype)


@softmax.defjvp
def _softmax_jvp(axis: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # Named here, so that the derivative reads the very array that is kept.
    result = checkpoint_name(softmax(primals[0], axis), VALUE)
    wide, tangent = (v.astype(accumulator(v.dtype)) for v in (result, tangents[0]))
    change = wide * (tangent - jnp.sum(wide * tangent, axis, keepdims=True))
    return result, change.astype(result.dtype)


@lowering_along("softmax", names_result=True)
def _softmax(ctx: TraceContext, node: Node, x: Named) -> Named:
    return Named(softmax(x.array, x.axes.index(SoftmaxOp.of_node(node).axis)), x.axes)


def _unit(full: Named, node: Node, *, centre: bool) -> Array:
    """Return the array in wide precision divided by its root mean square, then narrowed."""
    attrs = NormOp.of_node(node)
    at = full.axes.index(attrs.axis)
    wide = full.array.astype(accumulator(full.array.dtype))
    if centre:
        wide = wide - wide.mean(at, keepdims=True)
    scaled = wide * lax.rsqrt(jnp.mean(wide * wide, at, keepdims=True) + attrs.eps)
    return scaled.astype(full.array.dtype)


@lowering("rms_norm")
def _rms_norm(ctx: TraceContext, node: Node, x: Operand, scale: Named) -> Operand:
    def norm(full: Named) -> Named:
        factor = broadcast_like(scale, x).over(full.axes)
        return Named(_unit(full, node, centre=False) * factor, full.axes)

    return lifted(x, norm)


@lowering("layer_norm")
def _layer_norm(ctx: TraceContext, node: Node, x: Operand, scale: Named, bias: Named) -> Operand:
    def norm(full: Named) -> Named:
        unit = _unit(full, node, centre=True)
        factor, shift = (broadcast_like(v, x).over(full.axes) for v in (scale, bias))
        return Named(unit * factor + shift, full.axes)

    return lifted(x, norm)
