"""Sorted rows on a mesh: sent to the devices of their experts, and back."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from moecc.ir.attributes import CollectiveAttrs, WithinBufferAttrs
from moecc.ir.graph import Node, Value, setter_of
from moecc.ir.table.buffers import buffer_rows
from moecc.ir.table.slots import operands_by_word
from moecc.ir.traits import Collective, RowMove
from moecc.types.tensor import Extent
from moecc_backends.xla.dispatch.legality import region, why_meets
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
    map, spec = layout.sends or _at_once(ctx, node, x, layout)
    mesh = frozenset(spec.mesh)
    assert ctx.view.mesh is not None, "without a mesh nothing is sent"
    arrived = replace(
        layout,
        routing=replace(
            layout.routing, num_experts=layout.routing.num_experts // ctx.view.mesh.size(spec.mesh)
        ),
        permutation=_elsewhere(map, layout.routing.experts),
        group_sizes=map.group_sizes,
        exchange=ExchangeRecord(layout, map, spec),
        sends=None,
    )
    flat = ctx.view.varying(x.array.reshape(spec.rows, -1), mesh)
    sent = send(flat, map, spec)
    return Rows(sent.reshape(spec.arrivals, *x.array.shape[1:]), x.axes, arrived)


def _at_once(
    ctx: Context, node: Node, x: Rows, layout: SortedRows
) -> tuple[ExchangeMap, ExchangeSpec]:
    """Return how all rows are exchanged at once, with room for all that can arrive."""
    mesh, count = CollectiveAttrs.of_node(node).mesh, x.array.shape[0]
    assert ctx.view.mesh is not None, "without a mesh nothing is sent"
    devices = ctx.view.mesh.size(mesh)
    room = _room(node, layout, devices, layout.routing.num_experts // devices)
    spec = ExchangeSpec(mesh, count, min(room, count * devices), ctx.options.target == "cpu")
    sizes = ctx.view.varying(layout.group_sizes, frozenset(mesh))
    return exchange_map(sizes, mesh, spec.arrivals), spec


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
        assert before.map.there is not None, "in a round rows go to other devices once"
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


def exchanged_once(slots: Value) -> tuple[str, ...] | None:
    """Return the mesh axes along which the rows of `slots` go to their experts and back, or None.

    None, too, where they go in several steps, into bounded buffers, or meet one another, and where
    devices agree on their sums, of which a gradient of its own knows nothing.
    """
    sent = [n for n in slots.users if n.op.moves in _TO_SLOTS]
    back = [n.operands[0].node for n in slots.users if n.op.moves is RowMove.TO_TOKENS]
    if len(back) != 1 or not _exchanges(back[0], "group") or _buffer(sent[0].result) is not None:
        return None
    entries = [user for node in sent for user in node.result.users]
    if not all(_exchanges(node, "expert") for node in entries):
        return None
    others = (n for n in region(slots) if n not in entries and n is not back[0])
    if any(_exchanges_or_agrees(n) or why_meets(n, slots) for n in others):
        return None
    return CollectiveAttrs.of_node(entries[0]).mesh


_TO_SLOTS = (RowMove.TO_SLOTS, RowMove.GATES_TO_SLOTS)


def _exchanges_or_agrees(node: Node) -> bool:
    """Whether `node` is another exchange, or carries out a sum whose result devices agree on."""
    if node.op.collective is None:
        return False
    before, after = node.operands[0].type, node.result.type
    sharded = {m for axis in after.axes for m in axis.mesh}
    agreed = set(before.unreduced) - set(after.unreduced) - sharded
    return node.op.collective is Collective.EXCHANGES or bool(agreed)


def _exchanges(node: Node | None, split: str) -> bool:
    """Whether `node` sends ragged rows: to experts, cut by these, or back, cut by groups."""
    if node is None or node.op.collective is not Collective.EXCHANGES:
        return False
    return bool(node.attrs["split"] == split) and node.operands[0].type.ragged is not None


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
