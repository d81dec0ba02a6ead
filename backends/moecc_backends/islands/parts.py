"""A graph of all blocks cut into parts: what depends on the input of one block alone.

What depends on several blocks, the losses of all of them, is an epilogue on values that parts
return besides their output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import jax

from moecc.ir.graph import Graph, Node, Value, setter_of
from moecc.types import DType
from moecc_backends.islands.build import input_name, output_name
from moecc_backends.xla.lower.function import finalize_output, lower_values


@dataclass(frozen=True)
class Part:
    """What a graph computes of one block.

    Attributes:
      x: the block's input.
      y: its output.
      nodes: what the output needs, in order.
      side_nodes: what the other values need as well, in order.
      side: values that are outputs of the graph, or that the epilogue reads.
    """

    x: Value
    y: Value
    nodes: tuple[Node, ...]
    side_nodes: tuple[Node, ...]
    side: tuple[Value, ...]

    @property
    def params(self) -> tuple[Value, ...]:
        """The parameters, in the order of use."""
        used = (v for n in self.side_nodes for v in n.operands if v.is_param)
        return tuple(dict.fromkeys(used))

    @property
    def extra(self) -> tuple[Value, ...]:
        """The other inputs of the graph that it takes: a random key, a padding mask."""
        used = (v for n in self.side_nodes for v in n.operands)
        own = (v for v in used if v.node is None and not v.is_param and v is not self.x)
        return tuple(dict.fromkeys(own))


@dataclass(frozen=True)
class Parts:
    """A graph in parts.

    Attributes:
      graph: the graph.
      blocks: the part of each block, by its location.
      epilogue: what depends on several blocks, in order.
    """

    graph: Graph
    blocks: Mapping[str, Part]
    epilogue: tuple[Node, ...]

    @property
    def outputs(self) -> dict[str, Value]:
        """The outputs of the graph besides those of the blocks: losses and metrics."""
        mine = {part.y for part in self.blocks.values()}
        named = {output_name(loc) for loc in self.blocks}
        return {n: v for n, v in self.graph.outputs.items() if n not in named or v not in mine}

    def finish(self, given: Mapping[Value, jax.Array], dtype: DType) -> dict[str, jax.Array]:
        """Return the outputs besides those of the blocks from the values that parts returned."""
        values = lower_values(list(self.epilogue), given, dtype)
        return {n: finalize_output(values[v], v) for n, v in self.outputs.items() if v in values}


def cut(graph: Graph, locations: Iterable[str]) -> Parts:
    """Return the parts of a graph that has an input and an output for each location."""
    locs = list(locations)
    owner = _Owners(graph, locs)
    outputs = graph.outputs
    wanted = {v for n, v in outputs.items() if n not in {output_name(loc) for loc in locs}}
    blocks = {}
    for loc in locs:
        x, y = graph.inputs[input_name(loc)], outputs[output_name(loc)]
        side = tuple(v for v in owner.made[loc] if v in wanted or owner.is_shared(v))
        blocks[loc] = Part(x, y, owner.needed((y,)), owner.needed((y, *side)), side)
    return Parts(graph, blocks, tuple(owner.epilogue))


@dataclass
class _Owners:
    """Which block each node depends on."""

    graph: Graph
    locs: list[str]
    made: dict[str, list[Value]] = field(default_factory=dict)
    epilogue: list[Node] = field(default_factory=list)
    order: dict[Node, int] = field(default_factory=dict)
    late: set[Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.made = {loc: [] for loc in self.locs}
        of: dict[Value, frozenset[str]] = {}
        for loc in self.locs:
            of[self.graph.inputs[input_name(loc)]] = frozenset((loc,))
        for i, node in enumerate(self.graph):
            self.order[node] = i
            depends = frozenset().union(*(of.get(v, frozenset()) for v in node.operands))
            of.update(dict.fromkeys(node.results, depends))
            if len(depends) == 1:
                self.made[next(iter(depends))] += node.results
            elif depends:
                self.epilogue.append(node)
        self.late = set(self.epilogue)
        # Constants are made again wherever they are used.
        for node in reversed(list(self.graph)):
            is_constant = not of[node.results[0]]
            if is_constant and any(u in self.late for v in node.results for u in v.users):
                self.late.add(node)
        self.epilogue = sorted(self.late, key=self.order.__getitem__)

    def is_shared(self, value: Value) -> bool:
        """Whether the epilogue reads a value."""
        return any(user in self.late for user in value.users)

    def needed(self, values: Iterable[Value]) -> tuple[Node, ...]:
        """Return the nodes that `values` are made by, in order."""
        found: set[Node] = set()
        stack = [v.node for v in values]
        while stack:
            node = stack.pop()
            if node is None or node in found:
                continue
            found.add(node)
            stack.extend(v.node for v in node.operands)
            stack.extend(_setters(node))
        return tuple(sorted(found, key=self.order.__getitem__))


def _setters(node: Node) -> list[Node | None]:
    """Return what sets the extents of the types of a node."""
    types = (v.type for v in (*node.operands, *node.results))
    return [setter_of(e).node for t in types for e in t.extents]
