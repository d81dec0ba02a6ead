"""Mapping one graph onto another, from the outputs, in lock step, without recursion.

Two graphs compute the same if the same operations connect the same outputs and the same
inputs, up to names, locations, and the order of commutative operands.  The result maps the
parameters of one to those of the other.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

from moecc.errors import InputError, Problem
from moecc.families.listing import capped
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.printer import format_node
from moecc.support.text import with_article
from moecc.types.tensor import Extent, TensorType
from moecc.weights.expr import Expr
from moecc.weights.movement import Permute
from moecc.weights.simplify import simplify

MOST_DIFFERENCES = 5

AUXILIARY = ("loss.", "metric.", "trace.")
"""The names of outputs for training or monitoring; no family writes them."""


def match_parameters(target: Graph, graph: Graph) -> dict[Value, Expr]:
    """Return for each parameter of `target` the corresponding weight of `graph`.

    Losses, metrics and traces are ignored.  A parameter of `graph` may correspond to several of
    `target`; the reverse only where the weights are equal.  Axes of parameters may be in another
    order.

    Raises:
      InputError: the graphs differ; with the first differences, and both lines at each.
    """
    matcher = _Matcher(target, graph, _structure_keys(target, graph))
    matcher.run()
    if matcher.problems:
        problems = capped(matcher.problems, "difference", "differences", MOST_DIFFERENCES)
        raise InputError(problems)
    return matcher.weights


def _structure_keys(*graphs: Graph) -> dict[Value, int]:
    """Return for each value a number that values share iff they are computed alike.

    Parameters are alike if their axes are.  Structures are numbered, not hashed, so two
    different ones never get the same number.
    """
    numbers: dict[Hashable, int] = {}
    keys: dict[Value, int] = {}
    for graph in graphs:
        for value in (*graph.inputs.values(), *graph.params.values()):
            keys[value] = numbers.setdefault(_leaf(value), len(numbers))
        for node in graph:
            operands = [keys[v] for v in node.operands]
            if node.op.commutative:
                operands.sort()
            structure = (*_local(node), tuple(operands))
            for value in node.results:
                keys[value] = numbers.setdefault((structure, value.index), len(numbers))
    return keys


def _leaf(value: Value) -> Hashable:
    return ("param" if value.is_param else value.name, _axes(value.type))


def _local(node: Node) -> tuple[Hashable, ...]:
    return (node.op.name, *node.attrs.items())


def _axes(type: TensorType) -> frozenset[tuple[str, Hashable]]:
    """Return the axes of `type` as a set; extents are compared elsewhere."""
    return frozenset(
        (a.name, a.size.kind if isinstance(a.size, Extent) else a.size) for a in type.axes
    )


@dataclass
class _Matcher:
    target: Graph
    graph: Graph
    keys: dict[Value, int]
    weights: dict[Value, Expr] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def run(self) -> None:
        theirs = self.target.outputs
        ours = {n: v for n, v in self.graph.outputs.items() if not n.startswith(AUXILIARY)}
        if theirs.keys() != ours.keys():
            expected, found = ", ".join(theirs), ", ".join(ours)
            hint = "a family's model has no other outputs"
            self.problems.append(
                Problem("the graph has other outputs", None, expected, found, hint)
            )
            return
        stack = [(value, ours[name]) for name, value in theirs.items()]
        seen = set(stack)
        while stack:
            pair = stack.pop()
            following = [p for p in self._step(*pair) if p not in seen]
            seen.update(following)
            stack.extend(reversed(following))

    def _step(self, a: Value, b: Value) -> Iterator[tuple[Value, Value]]:
        """Compare a value of the target with one of ours; yield the pairs to compare next."""
        if a.is_param and b.is_param:
            self._bind(a, b)
        elif a.node is not None and b.node is not None and _same_operation(a, b):
            if _local(a.node) != _local(b.node):
                self._part(a, b)
            yield from zip(a.node.operands, self._ordered(a.node, b.node), strict=True)
        elif not (_is_input(a) and _is_input(b) and _leaf(a) == _leaf(b)):
            self._part(a, b)

    def _ordered(self, a: Node, b: Node) -> list[Value]:
        """Return the operands of `b` in the order of the matching operands of `a`."""
        if not a.op.commutative:
            return b.operands
        swapped = b.operands[::-1]
        return swapped if self._alike(a, swapped) > self._alike(a, b.operands) else b.operands

    def _alike(self, a: Node, operands: list[Value]) -> int:
        """Count the operands that agree; those of the same operation count a little."""
        score = 0
        for mine, other in zip(a.operands, operands, strict=True):
            if self.keys[mine] == self.keys[other]:
                score += 4
            elif _kind(mine) == _kind(other):
                score += 1
        return score

    def _bind(self, a: Value, b: Value) -> None:
        if _axes(a.type) != _axes(b.type):
            self._part(a, b)
            return
        if b.weight is None:
            what = "the parameter has no weight, so it cannot be written"
            self.problems.append(Problem(what, f"%{b.name}"))
            return
        weight = b.weight
        if b.type.names != a.type.names:
            weight = Permute(weight, a.type.names)
        before = self.weights.setdefault(a, weight)
        if before is not weight and simplify(before) is not simplify(weight):
            what = f"{self.target.name} has one tensor where the graph has two different ones"
            self.problems.append(Problem(what, f"%{b.name}", f"the weight of %{a.name}"))

    def _part(self, a: Value, b: Value) -> None:
        place = b.node.loc if b.node is not None else b.loc
        self.problems.append(
            Problem(
                f"the graph is not {with_article(self.target.name)}: first difference",
                place or None,
                _line(a),
                _line(b),
            )
        )


def _same_operation(a: Value, b: Value) -> bool:
    """Whether two results come of the same operation, whatever its attributes and operands are."""
    assert a.node is not None
    assert b.node is not None
    same = a.node.op is b.node.op and a.index == b.index
    return same and len(a.node.operands) == len(b.node.operands)


def _is_input(value: Value) -> bool:
    return value.node is None and not value.is_param


def _kind(value: Value) -> str:
    return value.node.op.name if value.node is not None else str(value.is_param)


def _line(value: Value) -> str:
    if value.node is not None:
        return format_node(value.node)
    return f"{'param' if value.is_param else 'input'} %{value.name} : {value.type}"
