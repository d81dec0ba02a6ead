"""Lowering of contractions: an einsum, or a product of each expert's rows with its weights."""

from __future__ import annotations

from moecc.ir.attributes import ContractAttrs
from moecc.ir.graph import Node
from moecc_backends.xla.kernels.batched_matmul import slot_matmul
from moecc_backends.xla.lower.precision import is_precise
from moecc_backends.xla.trace.arrays import (
    einsum,
    lifted,
    with_masked_rows,
    zeroed_rows,
)
from moecc_backends.xla.trace.context import Context, lowering
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
        return einsum(x, w, over, product_type(x.array.dtype, ctx.options.target))
    if isinstance(x, Rows):
        return _rows_times(ctx, x, w, over)
    assert isinstance(w, Rows), "one of the two is"
    return _rows_times(ctx, w, x, over)


def _fits_slots(x: Named, w: Named, over: tuple[str, ...]) -> bool:
    """Whether `w` has a matrix for each expert, which takes all that a slot holds."""
    is_slots = len(over) == 1 and x.axes == (*SLOT_AXES, *over)
    is_matrix = len(w.axes) == 3 and w.axes[0] == "expert"
    return is_slots and is_matrix and set(w.axes) & set(x.axes) == {"expert", *over}


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
