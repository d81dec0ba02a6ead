"""Lowering of contractions: an einsum, or a product of each expert's rows with its weights."""

from __future__ import annotations

from math import prod

from moecc.ir.attributes import ContractAttrs
from moecc.ir.graph import Node
from moecc_backends.xla.kernels.batched_matmul import slot_matmul
from moecc_backends.xla.kernels.row_product import rows_times
from moecc_backends.xla.lower.precision import is_precise
from moecc_backends.xla.trace.arrays import (
    einsum,
    lifted,
    with_masked_rows,
    zeroed_rows,
)
from moecc_backends.xla.trace.context import DIRECT, Context, lowering
from moecc_backends.xla.trace.dtypes import accumulator, product_type
from moecc_backends.xla.trace.values import SLOT_AXES, Named, Operand, Rows


@lowering("contract")
def _contract(ctx: Context, node: Node, x: Operand, w: Operand) -> Operand:
    over: tuple[str, ...] = ContractAttrs.of_node(node).over
    if isinstance(x, Named) and isinstance(w, Named):
        if is_precise(node):
            wide = accumulator(ctx.dtype)
            x, w = (Named(v.array.astype(wide), v.axes) for v in (x, w))
        if _fits_slots(x, w, over):
            return _slots_times(ctx, x, w, over)
        kind = product_type(x.array.dtype, ctx.options.target)
        if _is_on_cpu(ctx) and _is_matrix(x, w, over) and x.array.dtype == w.array.dtype == kind:
            return _flat_product(x, w, over)
        return einsum(x, w, over, kind)
    if isinstance(x, Rows):
        return _rows_times(ctx, x, w, over)
    assert isinstance(w, Rows), "one of the two is"
    return _rows_times(ctx, w, x, over)


def _fits_slots(x: Named, w: Named, over: tuple[str, ...]) -> bool:
    """Whether `w` has a matrix for each expert, which takes all that a slot holds."""
    is_slots = len(over) == 1 and x.axes == (*SLOT_AXES, *over)
    is_matrix = len(w.axes) == 3 and w.axes[0] == "expert"
    return is_slots and is_matrix and set(w.axes) & set(x.axes) == {"expert", *over}


def _is_on_cpu(ctx: Context) -> bool:
    """Whether a CPU has all of the arrays, or its shards of them, whose axes may be joined."""
    return ctx.options.target == "cpu" and ctx.interceptor is DIRECT


def _is_matrix(x: Named, w: Named, over: tuple[str, ...]) -> bool:
    """Whether each row of `x` along its last axis is multiplied with the matrix `w`."""
    is_matrix = len(w.axes) == 2 and len(over) == 1 and set(x.axes) & set(w.axes) == set(over)
    return is_matrix and len(x.axes) > 2 and x.axes[-1:] == over


def _flat_product(x: Named, w: Named, over: tuple[str, ...]) -> Named:
    """Multiply rows ``[…, a]`` with a matrix as one array of rows."""
    *lead, width = x.array.shape
    product = rows_times(x.array.reshape(prod(lead), width), w.array, w.axes.index(over[0]))
    (rest,) = (a for a in w.axes if a not in over)
    return Named(product.reshape(*lead, product.shape[-1]), (*x.axes[:-1], rest))


def _slots_times(ctx: Context, x: Named, w: Named, over: tuple[str, ...]) -> Named:
    """Multiply ``[expert, group, slot, a]`` with the matrices of the experts, in one product."""
    (rest,) = (a for a in w.axes[1:] if a not in over)
    experts, groups, slots, width = x.array.shape
    rows = x.array.reshape(experts, groups * slots, width)
    kind = product_type(rows.dtype, ctx.options.target)
    product = slot_matmul(rows, w.array.astype(rows.dtype), w.axes.index(over[0]), kind)
    return Named(product.reshape(experts, groups, slots, -1), (*SLOT_AXES, rest))


def _rows_times(ctx: Context, x: Rows, w: Operand, over: tuple[str, ...]) -> Operand:
    """Multiply rows with the weights of their experts, or with what all of them share."""
    if isinstance(w, Rows):
        other = w.inner()
        return lifted(x, lambda rows: einsum(rows, other, over))
    if not {"expert", "group"} & set(w.axes):
        return _shared_product(x, w, over)
    return x.layout.matmul(x, w, over, product_type(x.array.dtype, ctx.options.target))


def _shared_product(x: Rows, w: Named, over: tuple[str, ...]) -> Operand:
    """Multiply rows with what all of them share, whose gradient is a sum over rows."""
    product = lifted(zeroed_rows(x), lambda rows: einsum(rows, w, over))
    assert isinstance(product, Rows), "rows stay rows"
    return with_masked_rows(product)
