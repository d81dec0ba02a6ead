"""Cutting a graph into segments that repeat, so that equal layers are compiled once.

A segment is a run of nodes whose locations share a layer.  Two segments of one structure (the
same operations on operands that correspond) get one compiled function, and the parameters of a
segment are needed only while it runs: a model of any depth costs the compilation of one layer of
each kind, and the memory of one layer's parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from moecc.ir.graph import Graph, Node, Value, setter_of
from moecc.ir.table.slots import is_slots
from moecc.types.tensor import Axis, Extent, TensorType

_LAYER = re.compile(r"(.*?layers\.(?:\d+|\{[^}]*\}))(?:\.|$)")


@dataclass
class Segment:
    """A run of nodes with what flows in and out of it.

    Attributes:
      nodes: the nodes, in order.
      inputs: values from outside that it uses, parameters apart.
      params: the parameters that it uses.
      outputs: its values that are used later, or returned by the graph.
      last_uses: those of `inputs` that nothing uses afterwards.
      key: equal for segments that one compiled function serves.
    """

    nodes: list[Node]
    inputs: list[Value] = field(default_factory=list)
    params: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    last_uses: list[Value] = field(default_factory=list)
    key: tuple[object, ...] = ()


def segments(graph: Graph) -> list[Segment]:
    """Return the segments of `graph`, in order."""
    found = [Segment(run) for run in _runs(graph)]
    at = {node: i for i, segment in enumerate(found) for node in segment.nodes}
    at[graph.terminator] = len(found)
    for i, segment in enumerate(found):
        _fill(segment, i, at)
    return found


def layer_of(node: Node) -> str | None:
    """Return the layer that `node` belongs to, ``layers.3`` or ``layers.{3..23..4}``, or None."""
    match = _LAYER.match(node.loc)
    return match.group(1) if match else None


def _runs(graph: Graph) -> Iterator[list[Node]]:
    """Yield runs of nodes of one layer; a run never ends while a ragged value is alive."""
    run: list[Node] = []
    layer: str | None = None
    ragged: set[Value] = set()
    seen: set[Node] = set()
    for node in graph:
        here = layer_of(node)
        if run and here != layer and not ragged:
            yield run
            run = []
        layer = here
        run.append(node)
        seen.add(node)
        # The layout that a routing has goes with its value, so that counts as ragged too.
        ragged.update(v for v in node.results if v.type.ragged or is_slots(v))
        ragged = {v for v in ragged if not v.users.keys() <= seen}
    if run:
        yield run


def _fill(segment: Segment, index: int, at: dict[Node, int]) -> None:
    mine = set(segment.nodes)
    outside = dict.fromkeys(v for n in segment.nodes for v in n.operands if v.node not in mine)
    segment.params = [v for v in outside if v.is_param]
    segment.inputs = [v for v in outside if not v.is_param]
    results = [v for n in segment.nodes for v in n.results]
    segment.outputs = [v for v in results if not v.users.keys() <= mine]
    segment.last_uses = [v for v in segment.inputs if max(at[u] for u in v.users) == index]
    segment.key = _key(segment)


def _key(segment: Segment) -> tuple[object, ...]:
    numbers: dict[Value, int] = {}
    for value in (*segment.inputs, *segment.params):
        numbers[value] = len(numbers)
    # Shapes are those of the arrays at run time; what must agree here are the names of the axes,
    # and whether a value comes in from outside the graph.
    lines: list[object] = [tuple((v.type.names, v.node is None) for v in numbers)]
    for node in segment.nodes:
        uses = tuple(numbers[v] for v in node.operands)
        for value in node.results:
            numbers[value] = len(numbers)
        types = tuple(_type_key(v.type, numbers) for v in node.results)
        lines.append((node.op.name, uses, tuple(node.attrs.items()), types))
    lines.append(tuple(numbers[v] for v in segment.outputs))
    return tuple(lines)


def _type_key(type: TensorType, numbers: dict[Value, int]) -> object:
    return (type.dtype.name, tuple(_axis_key(a, numbers) for a in type.axes))


def _axis_key(axis: Axis, numbers: dict[Value, int]) -> object:
    if isinstance(axis.size, Extent):
        return (axis.name, axis.size.kind, numbers.get(setter_of(axis.size), -1))
    return (axis.name, axis.size)
