"""Chunks of rows, so that experts work on one while the next is on its way."""

from __future__ import annotations

from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.mesh import Mesh
from moecc.ir.replace import infer_again
from moecc.ir.traits import RowMove
from moecc_passes.sharding.experts.exchange import erase_unused
from moecc_passes.sharding.experts.layer import LaidLayer, need


def chunk_rows(graph: Graph, layer: LaidLayer, builder: Builder, mesh: Mesh, count: int) -> None:
    """Let the experts of `layer` work on `count` chunks of groups, one after the other.

    Raises:
      InputError: the groups of a device do not divide so, rows are ragged, or something else
        looks at what the experts make.
    """
    routed = layer.routed
    combine, sent = routed.combine, _dispatched(layer)
    group = sent[0].type["group"]
    parts = mesh.size(group.mesh)
    need(not layer.is_ragged, layer, "ragged rows have no equal chunks", "slots=capacity",
         "leave chunks out")  # fmt: skip
    need(isinstance(group.size, int) and group.size % (parts * count) == 0, layer,
         "the token groups of a device have no such chunks",
         f"a multiple of {parts * count} groups, not {group.size}",
         f"specialize{{groups={parts * count}}} first")  # fmt: skip
    region = _region(layer)
    made = combine.operands[0]
    away = graph.input(graph.fresh("away"), made.type)
    combine.set_operand(0, away)
    results = [made]
    for at in range(1, count):
        builder.before = combine
        values = {v: _chunk(builder, v, at, count, parts) for v in sent}
        for node in region:
            _copy(node, values, builder)
        results.append(values[made])
    first: dict[Value, Value] = {}
    for value in sent:
        assert value.node is not None, "it was dispatched"
        builder.before = value.node._next
        first[value] = _chunk(builder, value, 0, count, parts)
    for node in region:
        for number, value in enumerate(node.operands):
            if value in first:
                node.set_operand(number, first[value])
    infer_again(graph, region, start=region[0])
    builder.before = combine
    joined = builder.join(*results, axis="group", parts=parts, name=made.name)
    combine.set_operand(0, joined)
    graph.erase_input(away.name)


def _chunk(builder: Builder, rows: Value, at: int, count: int, parts: int) -> Value:
    return builder.chunk(rows, axis="group", at=at, of=count, parts=parts, name=rows.name)


def _dispatched(layer: LaidLayer) -> list[Value]:
    """Return the rows that are dispatched, and their gates where these go with them."""
    ways = (RowMove.TO_SLOTS, RowMove.GATES_TO_SLOTS)
    users = list(layer.routed.slots.users)
    return [n.result for way in ways for n in users if n.op.moves is way]


def _region(layer: LaidLayer) -> list[Node]:
    """Return the nodes between dispatch and combine, in order."""
    combine = layer.routed.combine
    depends = set(_dispatched(layer))
    found: list[Node] = []
    for node in layer.routed.dispatch.graph.walk(layer.routed.dispatch):
        if node is combine:
            break
        if any(v in depends for v in node.operands) and node.op.moves is None:
            depends.update(node.results)
            found.append(node)
    inside = {*found, combine}
    other = [u for n in found for v in n.results for u in v.users if u not in inside]
    need(not other, layer, "something else looks at what the experts make",
         "nothing between dispatch and combine is used elsewhere", "leave chunks out")  # fmt: skip
    return found


def _copy(node: Node, values: dict[Value, Value], builder: Builder) -> None:
    operands = [values.get(v, v) for v in node.operands]
    names = tuple(v.name for v in node.results)
    made = builder.node(node.op.name, *operands, names=names, **node.attrs)
    made.loc, made.origin = node.loc, node.origin
    values.update(zip(node.results, made.results, strict=True))


def unchunk(graph: Graph) -> int:
    """Make one of all chunks that are worked on alike, and return how many were made one."""
    count, changed = 0, list[Node]()
    for join in [n for n in graph if n.op.name == "join"]:
        chains = [_chain(v, at, len(join.operands)) for at, v in enumerate(join.operands)]
        if None in chains or len(set(chains)) != 1:
            continue
        first, others = join.operands[0], join.operands[1:]
        started = [n for n in _nodes_behind(first) if n.op.name == "chunk"]
        join.result.replace_by(first)
        join.erase()
        for value in others:
            erase_unused(value)
        for node in started:
            changed += node.result.users
            node.replace_by(node.operands[0])
        count += 1
    # Rows meet their gates, so that no type is right before all chunks are gone.
    infer_again(graph, (node for node in changed if node.alive))
    return count


def _nodes_behind(value: Value) -> list[Node]:
    """Return the nodes that make `value` of the chunks it comes from, these included."""
    found: dict[Node, None] = {}
    pending = [value.node]
    while pending:
        node = pending.pop()
        if node is None or node in found or not _has_chunk(node):
            continue
        found[node] = None
        pending.extend(v.node for v in node.operands if node.op.name != "chunk")
    return list(found)


def _has_chunk(node: Node) -> bool:
    """Whether a chunk is among what `node` is made of, up to a dispatch."""
    pending, seen = [node], set()
    while pending:
        one = pending.pop()
        if one.op.name == "chunk":
            return True
        if one in seen or one.op.name in ("dispatch", "join"):
            continue
        seen.add(one)
        pending.extend(v.node for v in one.operands if v.node is not None)
    return False


def _chain(value: Value, at: int, of: int) -> object:
    """Return what is done to chunk `at` to make `value`, alike for all chunks; None if nothing."""
    nodes = _nodes_behind(value)
    numbers = {n: i for i, n in enumerate(nodes)}
    lines = []
    for node in nodes:
        attrs = dict(node.attrs)
        if node.op.name == "chunk" and (attrs.pop("at"), attrs["of"]) != (at, of):
            return None
        uses = tuple(
            numbers[v.node] if v.node in numbers and node.op.name != "chunk" else v
            for v in node.operands
        )
        lines.append((node.op.name, uses, tuple(sorted(attrs.items()))))
    return tuple(lines) or None
