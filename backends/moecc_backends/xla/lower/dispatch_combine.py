"""Lowering of dispatch and combine: what the strategy of their routing makes of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moecc.ir.graph import Node, Value
from moecc_backends.xla.lower.precision import is_precise
from moecc_backends.xla.trace.arrays import elementwise
from moecc_backends.xla.trace.context import Context, lowering
from moecc_backends.xla.trace.dtypes import accumulator
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


@lowering("dispatch_gates")
def _dispatch_gates(
    ctx: Context, node: Node, gates: Named, experts: Named, slots: Named
) -> Operand | Deferred:
    layout = ctx.layouts[node.operands[2]]
    return layout.permute_gates(_by_token(gates, layout))


@lowering("weight_rows")
def _weight_rows(ctx: Context, node: Node, rows: Operand, gates: Operand) -> Operand:
    def weighted(x: jax.Array, weights: jax.Array) -> jax.Array:
        wide = jnp.promote_types(accumulator(x.dtype), weights.dtype)
        kind = wide if is_precise(node) else x.dtype
        return (x.astype(kind) * weights.astype(kind)).astype(x.dtype)

    return elementwise(weighted, rows, gates)


@lowering("combine", "combine_weighted", takes_deferred=True)
def _combine(
    ctx: Context,
    node: Node,
    rows: Operand | DeferredRows,
    experts: Named,
    slots: Named,
    gates: Named | None = None,
) -> Operand:
    layout = _layout_of(ctx, node.operands[0], rows, ctx.layouts[node.operands[2]])
    tokens = layout.routing.tokens
    made = layout.unpermute(rows, None if gates is None else _by_token(gates, layout))
    outer = tuple(a for a in node.result.type.names if a in tokens)
    return made.to((*outer, *(a for a in made.axes if a not in tokens)))


def _by_token(gates: Named, layout: DispatchLayout) -> jax.Array:
    """Return gates ``[tokens, choice]``, all token axes flattened."""
    tokens = layout.routing.tokens
    (choice,) = (a for a in gates.axes if a not in tokens)
    array = gates.to((*tokens, choice)).array
    return array.reshape(layout.routing.num_tokens, gates.size(choice))


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
