"""Lowering of contractions: an einsum, or a product of each expert's rows with its weights."""

from __future__ import annotations

import string
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from moecc.ir.graph import Node
from moecc.ir.remat_names import feeds_route
from moecc_backends.xla.dispatch.sorted_rows import SortedRows
from moecc_backends.xla.kernels.batched_matmul import slot_matmul
from moecc_backends.xla.trace.context import Context, lowering
from moecc_backends.xla.trace.dtypes import accumulator, product_type
from moecc_backends.xla.trace.values import (
    SLOT_AXES,
    Named,
    Operand,
    Rows,
    lifted,
    per_row,
    with_masked_rows,
    zeroed_rows,
)


@lowering("contract")
def _contract(ctx: Context, node: Node, x: Operand, w: Operand) -> Operand:
    over: tuple[str, ...] = node.attrs["over"]
    if isinstance(x, Named) and isinstance(w, Named):
        if feeds_route(node):
            # Selective precision: the router computes in float32 (ST-MoE §3.3).
            wide = accumulator(ctx.dtype)
            x, w = (Named(v.array.astype(wide), v.axes) for v in (x, w))
        if _fits_slots(x, w, over):
            return _slots_times(ctx, x, w, over)
        return einsum(x, w, over, product_type(x.array.dtype, ctx.options.target))
    if isinstance(x, Rows):
        return _rows_times(ctx, node, x, w)
    assert isinstance(w, Rows), "one of the two is"
    return _rows_times(ctx, node, w, x)


def einsum(x: Named, w: Named, over: tuple[str, ...], kind: Any = None) -> Named:
    """Sum the product of two arrays over the axes `over`; others that both have are batch axes.

    Args:
      x: one of them; the result has its type.
      w: the other.
      over: what is summed over.
      kind: the type that the product is asked for in; float32 at least by default.
    """
    result = (
        *(a for a in x.axes if a not in over),
        *(a for a in w.axes if a not in over and a not in x.axes),
    )
    letters = dict(zip(dict.fromkeys((*x.axes, *w.axes)), string.ascii_letters, strict=False))
    spell = ["".join(letters[a] for a in axes) for axes in (x.axes, w.axes, result)]
    array = jnp.einsum(
        f"{spell[0]},{spell[1]}->{spell[2]}",
        x.array,
        w.array,
        preferred_element_type=kind or accumulator(x.array.dtype),
    )
    return Named(array.astype(x.array.dtype), result)


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


def _rows_times(ctx: Context, node: Node, x: Rows, w: Operand) -> Operand:
    """Multiply packed rows with the weights of their experts, or with what all of them share."""
    over: tuple[str, ...] = node.attrs["over"]
    if isinstance(w, Rows):
        other = w.inner()
        return lifted(x, lambda rows: einsum(rows, other, over))
    if not {"expert", "group"} & set(w.axes):
        return _shared_product(x, w, over)
    batch = [a for a in w.axes if a in x.axes and a not in over]
    packing = x.packing
    if "group" in w.axes or batch or not isinstance(packing, SortedRows):
        # A weight for each row, which is large: for few rows, or a product so odd that it is small.
        picked = per_row(w, packing)
        return lifted(x, lambda rows: einsum(rows, picked, over))
    if node not in ctx.siblings:
        _multiply_groups(ctx, [node, *_siblings(node)], x, w, packing)
    return ctx.siblings[node]


def _shared_product(x: Rows, w: Named, over: tuple[str, ...]) -> Operand:
    """Multiply rows with what all of them share, whose gradient is a sum over rows."""
    product = lifted(zeroed_rows(x), lambda rows: einsum(rows, w, over))
    assert isinstance(product, Rows), "rows stay rows"
    return with_masked_rows(product)


def _siblings(node: Node) -> list[Node]:
    """Return the other contractions of the same rows with parameters alike, such as gate and up.

    They share one walk over the rows.
    """
    rows, weight = node.operands
    return [
        other
        for other in rows.users
        if weight.is_param
        and other is not node
        and other.op is node.op
        and other.operands[0] is rows
        and other.operands[1].is_param
        and other.attrs == node.attrs
        and other.operands[1].type.axes == weight.type.axes
    ]


def _multiply_groups(
    ctx: Context, nodes: list[Node], x: Rows, w: Named, packing: SortedRows
) -> None:
    """Multiply rows with the weights of `nodes`, of which `w` is the first, for each expert."""
    over: tuple[str, ...] = nodes[0].attrs["over"]
    rest = tuple(a for a in w.axes if a not in over and a != "expert")
    kept = tuple(a for a in x.axes if a not in over)
    # Whichever of the two stands last in the checkpoint stays last: nothing is transposed.
    inner_last = w.axes[-1] in over
    order = ("expert", *rest, *over) if inner_last else ("expert", *over, *rest)
    weights = [w if n is nodes[0] else ctx.beside(ctx.values[n.operands[1]], x) for n in nodes]
    sizes = tuple(w.size(a) for a in rest)
    width = prod(w.size(a) for a in over)
    shape = (-1, prod(sizes), width) if inner_last else (-1, width, prod(sizes))
    # Each row stands for as many as its other axes have entries.
    rows = x.inner().to(("rows", *kept, *over)).array
    lead = rows.shape[: 1 + len(kept)]
    products = packing.products(
        rows.reshape(-1, width),
        tuple(_of_shape(v, order, shape, rows) for v in weights),
        repeats=prod(lead[1:]),
        axis=2 if inner_last else 1,
        kind=product_type(rows.dtype, ctx.options.target),
    )
    for node, product in zip(nodes, products, strict=True):
        ctx.siblings[node] = x.with_array(product.reshape(*lead, *sizes), (*kept, *rest))


def _of_shape(
    weight: Operand, order: tuple[str, ...], shape: tuple[int, ...], like: jax.Array
) -> jax.Array:
    assert isinstance(weight, Named), "a parameter is never packed"
    experts = weight.size("expert")
    return weight.to(order).array.reshape(experts, *shape[1:]).astype(like.dtype)
