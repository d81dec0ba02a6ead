"""Lowering of dispatch and combine: what the strategy of their routing makes of them."""

from __future__ import annotations

from moecc.ir.graph import Node, Value
from moecc_backends.xla.trace.context import Context, lowering
from moecc_backends.xla.trace.values import (
    Deferred,
    DeferredRows,
    DispatchLayout,
    Named,
    Operand,
    Rows,
)


@lowering("dispatch")
def _dispatch(
    ctx: Context, node: Node, x: Named, experts: Named, slots: Named
) -> Operand | Deferred:
    return ctx.layouts[node.operands[2]].permute(x)


@lowering("combine", takes_deferred=True)
def _combine(
    ctx: Context,
    node: Node,
    rows: Operand | DeferredRows,
    experts: Named,
    slots: Named,
    gates: Named,
) -> Operand:
    layout = _layout_of(ctx, node.operands[0], rows, ctx.layouts[node.operands[2]])
    tokens = layout.routing.tokens
    (choice,) = (a for a in gates.axes if a not in tokens)
    weights = gates.to((*tokens, choice)).array.reshape(
        layout.routing.num_tokens, gates.size(choice)
    )
    made = layout.unpermute(rows, weights)
    outer = tuple(a for a in node.result.type.names if a in tokens)
    return made.to((*outer, *(a for a in made.axes if a not in tokens)))


def _layout_of(
    ctx: Context, value: Value, rows: Operand | DeferredRows, planned: DispatchLayout
) -> DispatchLayout:
    """Return the layout of `rows`: on a mesh, a device may have those of some experts alone."""
    if isinstance(rows, Rows):
        return rows.layout
    parts = ctx.view.shard_count(value.type["expert"])
    if parts == 1:
        return planned
    count = planned.routing.num_experts // parts
    return planned.of_experts(ctx.view.offset(value.type["expert"], count), count)
