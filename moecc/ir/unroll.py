"""Unroll repeated layers, for exporting, describing and passes that need flat graphs.

The inverse of the pass ``roll-layers``: a stacked parameter becomes one parameter per layer, by
the ranges in its name, and values stacked or picked along the layers connect to it directly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from moecc.ir.graph import Graph, Node, Value
from moecc.ir.ops.repetition import ScanOp, picked_at, repetitions, stacked_parts
from moecc.ir.structure import clone
from moecc.support.ranges import element, lengths

if TYPE_CHECKING:
    from moecc.weights.expr import Expr


def is_rolled(graph: Graph) -> bool:
    """Return whether `graph` repeats a body."""
    return any(node.body is not None for node in graph)


def users_within(value: Value) -> Iterator[Node]:
    """Yield the nodes that use `value`, descending into the bodies of scans."""
    for node in value.users:
        if node.body is None:
            yield node
            continue
        for operand, inner in zip(node.operands, node.body.inputs.values(), strict=True):
            if operand is value:
                yield from inner.users


def unrolled(graph: Graph) -> Graph:
    """Return `graph` if nothing is repeated, and otherwise an unrolled copy."""
    if not is_rolled(graph):
        return graph
    copy = clone(graph)
    unroll(copy)
    return copy


def unroll(graph: Graph) -> int:
    """Unroll, in place, every scan of `graph`; return how many there were."""
    scans = [node for node in graph if node.body is not None]
    for node in scans:
        _Unroller(graph, node).run()
    return len(scans)


@dataclass
class _Unroller:
    """Unrolls one scan.

    Attributes:
      graph: the graph that contains it.
      node: the scan.
    """

    graph: Graph
    node: Node

    def run(self) -> None:
        node, runs = self.node, self.runs
        attrs = ScanOp.of_node(node)
        carries, last = attrs.carries, attrs.carries + attrs.stacked
        carry, captured = list(node.operands[:carries]), node.operands[last:]
        slices = self.slices(node.operands[carries:last])
        collected: list[list[Value]] = []
        for at in range(runs):
            results = self.layer([*carry, *(s[at] for s in slices), *captured], at)
            carry = results[:carries]
            collected.append(results[carries:])
        for value, final in zip(node.results, carry, strict=False):
            value.replace_by(final)
        for value, each in zip(node.results[carries:], zip(*collected, strict=True), strict=True):
            self.give(value, list(each))
        stacks = dict.fromkeys(
            v.node for v in node.operands if stacked_parts(v, self.axis) is not None
        )
        node.erase()
        for stack in stacks:
            if stack is not None and stack.is_dead:
                stack.erase()

    @property
    def axis(self) -> str:
        return repetitions(self.node.attrs)[0]

    @property
    def runs(self) -> int:
        return repetitions(self.node.attrs)[1]

    def layer(self, operands: list[Value], at: int) -> list[Value]:
        """Copy the body for one iteration, and return its results."""
        body = self.node.body
        assert body is not None, "a scan has a body"
        values = dict(zip(body.inputs.values(), operands, strict=True))
        for inner in body:
            names = [element(v.name, at) for v in inner.results]
            loc = element(inner.loc, at)
            self.graph.copy(inner, values, names=names, loc=loc, before=self.node)
        return [values[v] for v in body.terminator.operands]

    def slices(self, stacked: list[Value]) -> list[list[Value]]:
        """Return, for each stacked operand, its slice for each iteration."""
        apart = [v for v in stacked if self.comes_apart(v)]
        params = self.take_apart(apart)
        return [params.get(v) or self.parts(v) for v in stacked]

    def parts(self, value: Value) -> list[Value]:
        parts = stacked_parts(value, self.axis)
        if parts is not None:
            return parts
        index = (
            self.graph.append(
                "index", [value], {"axis": self.axis, "at": at}, before=self.node, loc=self.node.loc
            )
            for at in range(self.runs)
        )
        return [node.result for node in index]

    def comes_apart(self, value: Value) -> bool:
        """Return whether a parameter stacks one parameter per layer and has no other use."""
        if (
            not value.is_param
            or lengths(value.name) != {self.runs}
            or value.users != {self.node: 1}
        ):
            return False
        return not any(element(value.name, at) in self.graph for at in range(self.runs))

    def take_apart(self, stacked: list[Value]) -> dict[Value, list[Value]]:
        """Replace each of `stacked` by one parameter per layer, in position, layer by layer."""
        graph, apart = self.graph, set(stacked)
        layer_params: dict[Value, list[Value]] = {}
        order: list[Value] = []
        for together, group in groupby(list(graph.params.values()), apart.__contains__):
            values = list(group)
            if not together:
                order += values
                continue
            layers = [[self.part(v, at) for v in values] for at in range(self.runs)]
            order += [v for layer in layers for v in layer]
            layer_params |= {v: list(parts) for v, *parts in zip(values, *layers, strict=True)}
        for value, parts in layer_params.items():
            self.node.set_operand(self.node.operands.index(value), parts[0])
            graph.erase_param(value.name)
        graph.order_params(order)
        return layer_params

    def part(self, value: Value, at: int) -> Value:
        """Create the parameter of one layer of a stacked one."""
        weight = None if value.weight is None else _part(value.weight, self.axis, at)
        name, loc = element(value.name, at), element(value.loc, at)
        return self.graph.param(name, value.type.without(self.axis), weight, loc=loc)

    def give(self, value: Value, parts: list[Value]) -> None:
        """Replace a stacked result by the results of the iterations."""
        for user in list(value.users):
            at = picked_at(user, self.axis)
            if at is not None:
                user.replace_by(parts[at])
        if not value.users:
            return
        first = next((n for n in self.graph.walk(self.node) if n in value.users), None)
        loc = self.node.loc if first is None else first.loc
        stack = self.graph.append("stack", parts, {"axis": self.axis}, loc=loc, before=first)
        value.replace_by(stack.result)


def _part(weight: Expr, axis: str, at: int) -> Expr:
    """Return the expression of one layer of a stacked weight."""
    from moecc.weights.movement import Index, Stack
    from moecc.weights.simplify import simplify

    if isinstance(weight, Stack) and weight.axis == axis:
        return weight.xs[at]
    return simplify(Index(weight, axis, at))
