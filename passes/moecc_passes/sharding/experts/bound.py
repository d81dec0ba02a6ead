"""Bounded receive buffers: rows that a device has no room for get no slot, and are counted."""

from __future__ import annotations

from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Value
from moecc.ir.mesh import Mesh
from moecc.ir.replace import infer_again
from moecc.ir.table.slots import operands_by_word
from moecc_passes.sharding.experts.layer import LaidLayer, need

PREFIX = "dropped."
"""Outputs that count the choices which found no room begin so, and go on with the layer."""


def bound_rows(graph: Graph, layer: LaidLayer, builder: Builder, mesh: Mesh, factor: float) -> None:
    """Leave out what does not fit into `factor` times a device's share, and return the count.

    Args:
      graph: the graph.
      layer: a dropless layer.
      builder: makes the nodes.
      mesh: the mesh of the graph.
      factor: the room of a device, in shares of the choices.
    """
    routed = layer.routed
    need(layer.is_ragged, layer, "under a capacity every buffer is bounded already",
         "slots=ragged", "leave buffer-factor out")  # fmt: skip
    builder.before = routed.dispatch
    slots, experts = routed.slots, routed.experts
    counts = _counts(layer, builder)
    outer = tuple(m for m in counts.type["group"].mesh if m not in layer.expert_mesh)
    over = counts.type["group"].mesh[len(outer) :]
    if over:
        counts = builder.all_gather(counts, axis="group", mesh=over, name="counts")
    tokens = routed.tokens
    keep = builder.within_buffer(
        experts,
        slots,
        counts,
        tokens=tokens,
        parts=mesh.size(layer.expert_mesh),
        blocks=mesh.size(outer),
        factor=factor,
    )
    bounded = _placed_again(layer, builder, keep)
    movers = [n for n in (routed.dispatch, routed.gate_dispatch, routed.combine) if n is not None]
    for node in movers:
        node.set_operand(2, bounded)
    dropped = _dropped(builder, slots, bounded)
    infer_again(graph, movers, start=routed.assigner)
    graph.set_output(f"{PREFIX}{routed.name}", dropped)


def _placed(builder: Builder, slots: Value) -> Value:
    """Return 1 for each choice that has a slot, of the axes of `slots`."""
    none = builder.constant(value=-1.0, dtype="i32")
    ones = builder.broadcast(builder.constant(value=1.0, dtype="f32"), slots)
    return builder.mask(ones, builder.less(none, slots), fill=0.0)


def _counts(layer: LaidLayer, builder: Builder) -> Value:
    """Return how many slots of each group and expert are taken, ``[group, expert]``."""
    routed = layer.routed
    count = routed.assignment.experts
    hot = builder.one_hot(routed.experts, into=(("expert", count),))
    each = builder.sum(builder.mul(hot, _placed(builder, routed.slots)), axes=routed.choice)
    return builder.group_sum(each, routed.slots, name="counts")


def _placed_again(layer: LaidLayer, builder: Builder, keep: Value) -> Value:
    node = layer.routed.assigner
    need(node.op.name == "assign_slots", layer, "experts that choose have a bound already",
         "slots that assign_slots gives", "leave buffer-factor out")  # fmt: skip
    given = {**operands_by_word(node.operands, node.attrs), "keep": keep}
    attrs = {**node.attrs, "using": tuple(given)}
    operands, names = (node.operands[0], *given.values()), (layer.routed.slots.name,)
    return builder.node(node.op.name, *operands, names=names, **attrs).result


def _dropped(builder: Builder, before: Value, after: Value) -> Value:
    """Return how many choices had a slot and have none any more."""
    axes = before.type.names
    lost = builder.sub(_placed(builder, before), _placed(builder, after))
    total = builder.sum(lost, axes=axes, name="dropped")
    if total.type.unreduced:
        total = builder.all_reduce(total, mesh=total.type.unreduced, name="dropped")
    return total
