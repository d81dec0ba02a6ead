"""Sorted rows on a mesh: sent to the devices of their experts, and back."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from moecc.ir.attributes import CollectiveAttrs, WithinBufferAttrs
from moecc.ir.graph import Node, Value, setter_of
from moecc.ir.table.buffers import buffer_rows
from moecc.ir.table.slots import operands_by_word
from moecc.types.tensor import Extent
from moecc_backends.xla.dispatch.permutation import Permutation
from moecc_backends.xla.dispatch.sorted_rows import ExchangeRecord, SortedRows
from moecc_backends.xla.mesh.all_to_all import (
    ExchangeMap,
    ExchangeSpec,
    exchange_map,
    send,
    send_back,
)
from moecc_backends.xla.trace.context import Context
from moecc_backends.xla.trace.values import Rows


def send_rows(ctx: Context, node: Node, x: Rows, layout: SortedRows) -> Rows:
    """Return the rows that all devices have for the local experts, sorted by expert."""
    mesh, count = CollectiveAttrs.of_node(node).mesh, x.array.shape[0]
    assert ctx.view.mesh is not None, "without a mesh nothing is sent"
    devices = ctx.view.mesh.size(mesh)
    num_experts = layout.routing.num_experts // devices
    room = _room(node, layout, devices, num_experts)
    spec = ExchangeSpec(mesh, count, min(room, count * devices), ctx.options.target == "cpu")
    sizes = ctx.view.varying(layout.group_sizes, frozenset(mesh))
    plan = exchange_map(sizes, mesh, spec.arrivals)
    arrived = replace(
        layout,
        routing=replace(layout.routing, num_experts=num_experts),
        permutation=_elsewhere(plan, layout.routing.experts),
        group_sizes=plan.group_sizes,
        exchange=ExchangeRecord(layout, plan, spec),
    )
    flat = ctx.view.varying(x.array.reshape(count, -1), frozenset(mesh))
    sent = send(flat, plan, spec)
    return Rows(sent.reshape(spec.arrivals, *x.array.shape[1:]), x.axes, arrived)


def send_rows_back(x: Rows, layout: SortedRows) -> Rows:
    """Return the rows where they were before they were sent."""
    record = layout.exchange
    assert record is not None, "only what was sent comes back"
    flat = send_back(x.array.reshape(x.array.shape[0], -1), record.map, record.spec)
    return Rows(flat.reshape(-1, *x.array.shape[1:]), x.axes, record.origin)


def local_rows(ctx: Context, node: Node, x: Rows, layout: SortedRows) -> Rows:
    """Return the rows of the local experts, of rows that every device has for all of them."""
    mesh = CollectiveAttrs.of_node(node).mesh
    assert ctx.view.mesh is not None, "without a mesh all experts are local"
    count = layout.routing.num_experts // ctx.view.mesh.size(mesh)
    first = jax.lax.axis_index(mesh) * count
    own = layout.of_experts(first, count)
    # A token goes to an expert at most once, so few local experts have fewer rows than all.
    tokens, choices = layout.routing.experts.shape
    most = own.permutation.choice_of_row[: tokens * min(choices, count)]
    own = replace(own, permutation=own.permutation._replace(choice_of_row=most))
    choice = own.permutation.choice_of_row
    row = layout.permutation.row_of_choice.reshape(-1)[jnp.maximum(choice, 0)]
    array = ctx.view.varying(x.array, frozenset(mesh))
    taken = jnp.take(array, jnp.where(choice >= 0, row, 0), axis=0)
    is_used = own.is_used.reshape(-1, *[1] * (taken.ndim - 1))
    return Rows(jnp.where(is_used, taken, jnp.zeros((), taken.dtype)), x.axes, own)


def _elsewhere(plan: ExchangeMap, experts: jax.Array) -> Permutation:
    """Return a map of which rows are used; their choices are on other devices."""
    return Permutation(plan.arrival_of_row, jnp.full_like(experts, -1))


def _room(node: Node, layout: SortedRows, devices: int, num_experts: int) -> int:
    """Return the most rows that can arrive: each token goes to an expert at most once."""
    tokens, choices = layout.routing.experts.shape
    before = layout.exchange
    while before is not None:
        devices *= before.map.there.send_sizes.size
        before = before.origin.exchange
    room = tokens * devices * min(choices, num_experts)
    bound = _buffer(node.operands[0])
    if bound is None:
        return room
    parts = WithinBufferAttrs.of_node(bound).parts
    if parts * num_experts != bound.operands[2].type["expert"].size:
        return room
    return min(room, buffer_rows(bound.attrs, tokens * devices, choices))


def _buffer(rows: Value) -> Node | None:
    """Return what bounds the buffers for `rows`, the `keep` operand of ``assign_slots``."""
    axis = rows.type.ragged
    if axis is None or not isinstance(axis.size, Extent):
        return None
    node = setter_of(axis.size).node
    if node is None:
        return None
    keep = operands_by_word(node.operands, node.attrs).get("keep")
    bound = None if keep is None else keep.node
    return bound if bound is not None and bound.op.name == "within_buffer" else None
