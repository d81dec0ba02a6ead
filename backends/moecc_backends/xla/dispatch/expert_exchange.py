"""Packed rows that lie on the devices of their experts, and how they get there and back."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from moecc.ir.graph import Node, Value
from moecc.ir.table.buffers import buffer_rows
from moecc.ir.table.slots import operands_by_word
from moecc_backends.xla.dispatch.permutation import Placement
from moecc_backends.xla.dispatch.sorted_rows import SortedRows
from moecc_backends.xla.mesh.all_to_all import Hop, Way, hop, send, send_back
from moecc_backends.xla.trace.context import Context
from moecc_backends.xla.trace.values import Rows


@dataclass(frozen=True)
class Journey:
    """How rows came where they are.

    Attributes:
      origin: how they lay before.
      hop: the map of the exchange.
      way: the mesh axes and sizes of the exchange.
    """

    origin: SortedRows
    hop: Hop
    way: Way


def rows_sent(ctx: Context, node: Node, x: Rows, packing: SortedRows) -> Rows:
    """Return the rows that all devices have for the own experts, sorted by expert."""
    mesh, count = node.attrs["mesh"], x.array.shape[0]
    assert ctx.local.mesh is not None, "without a mesh nothing is sent"
    devices = ctx.local.mesh.size(mesh)
    num_experts = packing.routing.num_experts // devices
    room = _room(node, packing, devices, num_experts)
    way = Way(mesh, count, min(room, count * devices), ctx.options.target == "cpu")
    route = hop(ctx.local.varying(packing.group_sizes, frozenset(mesh)), mesh, way.arrivals)
    arrived = replace(
        packing,
        routing=replace(packing.routing, num_experts=num_experts),
        placement=_unplaced(route, packing.routing.experts),
        group_sizes=route.group_sizes,
        journey=Journey(packing, route, way),
    )
    flat = ctx.local.varying(x.array.reshape(count, -1), frozenset(mesh))
    sent = send(flat, route, way)
    return Rows(sent.reshape(way.arrivals, *x.array.shape[1:]), x.axes, arrived)


def rows_sent_back(x: Rows, packing: SortedRows) -> Rows:
    """Return the rows where they were before they were sent."""
    journey = packing.journey
    assert isinstance(journey, Journey), "only what was sent comes back"
    flat = send_back(x.array.reshape(x.array.shape[0], -1), journey.hop, journey.way)
    return Rows(flat.reshape(-1, *x.array.shape[1:]), x.axes, journey.origin)


def own_rows(ctx: Context, node: Node, x: Rows, packing: SortedRows) -> Rows:
    """Return the rows of the own experts, of rows that every device has for all of them."""
    mesh = node.attrs["mesh"]
    assert ctx.local.mesh is not None, "without a mesh all experts are the own"
    count = packing.routing.num_experts // ctx.local.mesh.size(mesh)
    first = jax.lax.axis_index(mesh) * count
    own = type(packing).of(packing.routing.of_experts(first, count))
    # A token goes to an expert at most once, so few own experts have fewer rows than all.
    tokens, choices = packing.routing.experts.shape
    most = own.placement.choice_of_row[: tokens * min(choices, count)]
    own = replace(own, placement=own.placement._replace(choice_of_row=most))
    choice = own.placement.choice_of_row
    row = packing.placement.row_of_choice.reshape(-1)[jnp.maximum(choice, 0)]
    array = ctx.local.varying(x.array, frozenset(mesh))
    taken = jnp.take(array, jnp.where(choice >= 0, row, 0), axis=0)
    is_used = own.is_used.reshape(-1, *[1] * (taken.ndim - 1))
    return Rows(jnp.where(is_used, taken, jnp.zeros((), taken.dtype)), x.axes, own)


def _unplaced(route: Hop, experts: jax.Array) -> Placement:
    """Return a placement that says which rows are used; their choices are elsewhere."""
    return Placement(route.arrival_of_row, jnp.full_like(experts, -1))


def _room(node: Node, packing: SortedRows, devices: int, num_experts: int) -> int:
    """Return the most rows that can arrive: each token goes to an expert at most once."""
    tokens, choices = packing.routing.experts.shape
    before = packing.journey
    while isinstance(before, Journey):
        devices *= before.hop.there.send_sizes.size
        before = before.origin.journey
    room = tokens * devices * min(choices, num_experts)
    bound = _buffer(node.operands[0])
    if bound is None or bound.attrs["parts"] * num_experts != bound.operands[2].type["expert"].size:
        return room
    return min(room, buffer_rows(bound.attrs, tokens * devices, choices))


def _buffer(rows: Value) -> Node | None:
    """Return what bounds the buffers for `rows`: the `keep` operand of ``assign_slots``."""
    extent = rows.type.ragged
    place = None if extent is None else getattr(extent.size, "value", None)
    node = None if place is None else place.node
    if node is None:
        return None
    keep = operands_by_word(node.operands, node.attrs).get("keep")
    bound = None if keep is None else keep.node
    return bound if bound is not None and bound.op.name == "within_buffer" else None
