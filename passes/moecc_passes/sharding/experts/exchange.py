"""All-to-all: rows go to the devices of their experts, and results come back."""

from __future__ import annotations

from collections.abc import Iterable

from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.replace import infer_again, replace_value
from moecc.sharding.collectives import Step
from moecc.sharding.routes import Slice, from_experts, to_experts
from moecc.types.tensor import TensorType
from moecc_passes.sharding.emit import emit
from moecc_passes.sharding.experts.layer import LaidLayer, need


def exchange(graph: Graph, layer: LaidLayer, builder: Builder, slice_over: str | None) -> None:
    """Bring the rows of `layer` to their experts by all-to-all, and the results back.

    With `slice_over`, devices that are copies of one another along that mesh axis send a part of
    each row, cut along its width, and gather the rows where the experts are (mesh-tensorflow's
    ``d_model_split``).  Results are scattered, sent back and combined in parts, and gathered
    as tokens, of which there are fewer than rows.
    """
    routed = layer.routed
    rows = routed.dispatch.results[0]
    target = layer.entries[0].result.type
    part = None if slice_over is None else Slice(_width(layer), slice_over)
    if part is not None:
        _check_slice(layer, part.mesh, target)
        builder.before = routed.dispatch
        x = routed.dispatch.operands[0]
        routed.dispatch.set_operand(0, emit(builder, x, [part.shard]))
        infer_again(graph, [routed.dispatch], start=routed.dispatch)
    _enter(layer, builder, rows, target, part)
    _leave(layer, builder, part)


def _width(layer: LaidLayer) -> str:
    """Return the axis of a row's elements."""
    left = [n for n in layer.made.type.names if n not in ("group", "expert", "slot")]
    need(len(left) == 1, layer, "rows have one axis besides group, expert and slot",
         "one axis, embed say", "leave the slice out")  # fmt: skip
    return left[0]


def _check_slice(layer: LaidLayer, mesh: str, target: TensorType) -> None:
    x = layer.routed.dispatch.operands[0]
    used = {m for t in (x.type, target) for a in t.axes for m in a.mesh}
    need(mesh not in used, layer, f"rows are sharded over {mesh!r} already",
         "a mesh axis that shards neither tokens nor experts", "leave the slice out")  # fmt: skip


def _enter(
    layer: LaidLayer, builder: Builder, rows: Value, target: TensorType, part: Slice | None
) -> None:
    _brought(builder, layer.entries, to_experts(rows.type, target, part))
    for entry in layer.gate_entries[:1]:
        # Copies send parts of rows, and each the gates of all.
        gates, type = entry.operands[0], entry.result.type
        _brought(builder, layer.gate_entries, to_experts(gates.type, type, None))


def _brought(builder: Builder, entries: tuple[Node, ...], steps: Iterable[Step]) -> None:
    """Put `steps` in the place of collectives that bring one value to one place."""
    builder.before = entries[0]
    value = emit(builder, entries[0].operands[0], steps)
    for entry in entries:
        replace_value(entry.result, value)
        entry.erase()


def _leave(layer: LaidLayer, builder: Builder, part: Slice | None) -> None:
    combine, made = layer.routed.combine, layer.made
    builder.before = combine
    unused = combine.operands[0]
    combine.set_operand(0, emit(builder, made, from_experts(made.type, unused.type, part)))
    erase_unused(unused)
    if part is None:
        return
    (type,) = combine.op.result_types(combine.operands, combine.attrs)
    users = uses(combine.result)
    combine.result.type = type
    builder.before = combine._next
    whole = emit(builder, combine.result, [part.gather])
    for user, number in users:
        user.set_operand(number, whole)


def uses(value: Value) -> list[tuple[Node, int]]:
    """Return every use of `value`: the node and the number of its operand."""
    return [(u, i) for u in value.users for i, v in enumerate(u.operands) if v is value]


def erase_unused(value: Value) -> None:
    """Erase the node of `value` if nothing uses it, and so on backwards."""
    pending = [value]
    while pending:
        node = pending.pop().node
        if node is not None and node.alive and node.is_dead:
            operands = list(node.operands)
            node.erase()
            pending.extend(operands)
