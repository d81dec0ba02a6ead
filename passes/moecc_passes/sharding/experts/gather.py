"""Gathered tokens: every device sees the tokens of all, and keeps what its experts chose.

The ring of experts gathers tokens before dispatch and scatters the sums after combine; routing is
done again on what was gathered, which is exact and saves sending it.
"""

from __future__ import annotations

from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.replace import infer_again
from moecc.ir.table.collectives import format_sharding
from moecc.ir.traits import Collective
from moecc.sharding.routes import gathered, sums_back, without
from moecc.sharding.vias import Via
from moecc_passes.sharding.emit import emit
from moecc_passes.sharding.experts.exchange import erase_unused, uses
from moecc_passes.sharding.experts.layer import LaidLayer
from moecc_passes.sharding.groups import ATTRIBUTE as GROUPS


def gather_tokens(graph: Graph, layer: LaidLayer, builder: Builder, way: Via) -> None:
    """Bring tokens instead of rows to the experts of `layer`.

    Args:
      graph: the graph.
      layer: the layer.
      builder: makes the nodes.
      way: whether the results are scattered, or all have the sums.
    """
    over = layer.exchanged
    routed = layer.routed
    before = (*routed.dispatch.results, routed.slots, routed.gates, routed.experts)
    replay = _Replay(graph, layer, builder, over)
    experts, slots, gates = (replay.value(v) for v in (routed.experts, routed.slots, routed.gates))
    x = replay.value(routed.dispatch.operands[0])
    rows = builder.dispatch(x, experts, slots, name=routed.dispatch.results[0].name)
    own = builder.shard(rows, axis="expert", mesh=layer.expert_mesh, name=rows.name)
    own_gates = _own_gates(layer, builder, (gates, experts, slots))
    combine = routed.combine
    tokens, exits = combine.result, combine.operands[0]
    # What follows must not see the types change before the tokens are back where they were.
    away = graph.input(graph.fresh("away"), tokens.type)
    for user, number in uses(tokens):
        user.set_operand(number, away)
    given = (layer.made, experts, slots, gates)
    for number, value in enumerate(given[: len(combine.operands)]):
        combine.set_operand(number, value)
    erase_unused(exits)
    users: list[Node] = []
    for entries, brought in ((layer.entries, own), (layer.gate_entries, own_gates)):
        for entry in entries:
            assert brought is not None, "gates that are brought were dispatched"
            users += entry.result.users
            entry.result.replace_by(brought)
            erase_unused(entry.result)
    # Rows meet their gates, so that both are replaced before a type is inferred.
    infer_again(graph, users, start=routed.assigner)
    infer_again(graph, [combine], start=combine)
    builder.before = combine._next
    made = combine.result
    y = emit(builder, made, sums_back(made.type, away.type, way))
    away.replace_by(y)
    graph.erase_input(away.name)
    for value in before:
        erase_unused(value)
    replay.take_names()


def _own_gates(layer: LaidLayer, builder: Builder, of: tuple[Value, ...]) -> Value | None:
    """Return the gates of the rows of a device's experts, where gates go with rows."""
    sent = layer.routed.gate_dispatch
    if sent is None:
        return None
    made = builder.dispatch_gates(*of, name=sent.result.name)
    return builder.shard(made, axis="expert", mesh=layer.expert_mesh, name=made.name)


class _Replay:
    """Does again, on gathered tokens, what the routing of a layer does.

    Attributes:
      over: the mesh axes along which tokens are gathered.
    """

    def __init__(
        self, graph: Graph, layer: LaidLayer, builder: Builder, over: tuple[str, ...]
    ) -> None:
        self.graph = graph
        self.over = over
        self.builder = builder
        self.dispatch = layer.routed.dispatch
        self.x = self.dispatch.operands[0]
        builder.before = self.dispatch
        self.map: dict[Value, Value] = {}
        self.map[self.x] = self._gathered(self.x)
        routed = layer.routed
        for node in _between(graph, self.x, [routed.slots, routed.gates, routed.experts]):
            self._again(node)

    def take_names(self) -> None:
        """Call what was done again as what it stands for, where that is gone."""
        groups = self.graph.attrs.get(GROUPS, {})
        for old, new in self.map.items():
            if old.name not in self.graph and new.name in self.graph:
                self.graph.rename(new, old.name)
            elif old.name in groups and new.node is not old.node:
                groups[new.name] = groups[old.name]

    def value(self, value: Value) -> Value:
        """Return what stands for `value`: done again, gathered, or itself where it is whole."""
        if value not in self.map:
            self.map[value] = self._gathered(value)
        return self.map[value]

    def _gathered(self, value: Value) -> Value:
        return emit(self.builder, value, gathered(value.type, self.over))

    def _again(self, node: Node) -> None:
        """Do `node` again, unless the gathered operand is sharded as its result already."""
        operands = [self.value(v) for v in node.operands]
        attrs = dict(node.attrs)
        if node.op.collective is Collective.ANY:
            type = without(node.result.type, self.over)
            if type == operands[0].type:
                self.map[node.result] = operands[0]
                return
            attrs["to"] = format_sharding(type)
        names = tuple(v.name for v in node.results)
        made = self.builder.node(node.op.name, *operands, names=names, **attrs)
        made.loc = node.loc
        self.map.update(zip(node.results, made.results, strict=True))


def _between(graph: Graph, x: Value, targets: list[Value]) -> list[Node]:
    """Return the nodes, in order, that `targets` need and that depend on `x`, or give slots."""
    needed: set[Node] = set()
    pending = [v.node for v in targets if v.node is not None]
    while pending:
        node = pending.pop()
        if node in needed or node is x.node:
            continue
        needed.add(node)
        pending.extend(v.node for v in node.operands if v.node is not None)
    depends, found = {x}, []
    slots = {v.node for v in targets[:1]}
    for node in graph.walk(x.node):
        if node in needed and (node in slots or any(v in depends for v in node.operands)):
            depends.update(node.results)
            found.append(node)
    return found
