"""Random shardings: a graph, sharded over a mesh in any way that its types allow.

Inputs and parameters are sharded along random axes, values are resharded at random, and where an
operation cannot take its operands as they are, they are gathered.  It knows no rules of layouts
and no operation: types decide what may be sharded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from moecc.errors import InputError
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.mesh import Mesh, set_mesh, sharding_problems
from moecc.ir.ops.slots import experts_of, is_slots
from moecc.ir.structure import copied
from moecc.ir.unroll import unrolled
from moecc.testing.weights import Choices
from moecc.types import Axis, TensorType


def random_sharding(graph: Graph, choices: Choices, mesh: Mesh) -> Graph:
    """Return a copy of `graph` sharded over `mesh`, with collectives, that means the same.

    Args:
      graph: a graph on no mesh; layers that it repeats are written out.
      choices: where the decisions come from.
      mesh: the mesh; two or three devices along each axis are enough to tell axes apart.
    """
    graph = unrolled(graph)
    for _ in range(2):
        try:
            return _Sharder(graph, choices, mesh, whole_slots=False).run()
        except InputError:
            continue
    return _Sharder(graph, choices, mesh, whole_slots=True).run()


class _Sharder:
    """A graph that is copied onto a mesh.

    Attributes:
      kept: the copies of nodes, as opposed to collectives.
      whole_slots: whether choices that get slots are replicated, which suits whatever follows.
    """

    def __init__(self, graph: Graph, choices: Choices, mesh: Mesh, whole_slots: bool) -> None:
        self.graph = graph
        self.choices = choices
        self.mesh = mesh
        self.whole_slots = whole_slots
        self.copy = Graph(graph.name, dict(graph.attrs))
        set_mesh(self.copy, mesh)
        self.values: dict[Value, Value] = {}
        self.kept: set[Node] = set()

    def run(self) -> Graph:
        """Return the copy.

        Raises:
          InputError: slots and what is to be put into them are sharded differently.
        """
        for name, value in self.graph.inputs.items():
            self.values[value] = self.copy.input(name, self._laid(value.type))
        for name, value in self.graph.params.items():
            type = self._laid(value.type)
            self.values[value] = self.copy.param(name, type, value.weight, loc=value.loc)
        for node in self.graph:
            self._append(node)
        for name, value in self.graph.outputs.items():
            self.copy.set_output(name, self.values[value])
        _erase_unused(self.copy, self.kept)
        return self.copy

    def _chance(self, percent: int) -> bool:
        return self.choices.below(100) >= 100 - percent

    def _laid(self, type: TensorType) -> TensorType:
        """Return `type`, some of its axes split over mesh axes that divide them."""
        free = list(self.mesh.names)
        axes = []
        for axis in type.axes:
            while free and self._chance(45):
                wider = (*axis.mesh, free[self.choices.below(len(free))])
                if isinstance(axis.size, int) and axis.size % self.mesh.size(wider):
                    break
                axis = Axis(axis.name, axis.size, wider)
                free.remove(wider[-1])
            axes.append(axis)
        return type.with_axes(axes)

    def _append(self, node: Node) -> None:
        """Append a copy of `node`, on operands sharded as it can take them."""
        builder = Builder(self.copy, loc=node.loc, origin=node.origin)
        slots = [v for v in node.operands if is_slots(v)]
        # Slots belong to the choices that they were assigned to, as these are sharded.
        bound = {experts_of(p): experts_of(self.values[p]) for p in slots}
        bound |= {p: self.values[p] for p in slots}
        operands = [bound.get(v) or self.values[v] for v in node.operands]
        free = [i for i, v in enumerate(node.operands) if v not in bound]
        for at in free:
            if self._chance(25):
                operands[at] = self._moved(builder, operands[at])
        if self.whole_slots and is_slots(node.results[-1]):
            operands = [_gathered(builder, v) for v in operands]
        copy = self._first_that_fits(builder, node, operands, free)
        self.kept.add(copy)
        for old, new in zip(node.results, copy.results, strict=True):
            # `value` with every sum carried out: everywhere, or scattered along an
            # axis.
            value = new
            for name in value.type.unreduced:
                along = [a for a in value.type.axes if self._divides(a, (name,))]
                if along and self._chance(50):
                    axis = along[self.choices.below(len(along))].name
                    value = builder.node("reduce_scatter", value, axis=axis, mesh=name).result
                else:
                    value = builder.node("all_reduce", value, mesh=name).result
            self.values[old] = value

    def _first_that_fits(
        self, builder: Builder, node: Node, operands: list[Value], free: list[int]
    ) -> Node:
        """Return `node` on `operands`: resharded as the first is, or else gathered."""
        attempts = [(_beside, at) for at in free if at] + [(_gathered, at) for at in free]
        for way, at in attempts:
            try:
                return self._again(node, operands)
            except InputError:
                operands[at] = way(builder, operands[at], operands[0])
        return self._again(node, operands)

    def _again(self, node: Node, operands: list[Value]) -> Node:
        names = [v.name for v in node.results]
        copy = self.copy.append(
            node.op, operands, copied(node.attrs), names=names, loc=node.loc, origin=node.origin
        )
        problems = [p for v in copy.results for p in sharding_problems(v.type, self.mesh)]
        if problems:
            copy.erase()
            raise InputError(problems)
        return copy

    def _moved(self, builder: Builder, value: Value) -> Value:
        """Return `value`, brought elsewhere by one collective if one can."""
        moves = list(self._moves(value.type))
        if not moves:
            return value
        op, attrs = moves[self.choices.below(len(moves))]
        try:
            return builder.node(op, value, names=(), **attrs).result
        except InputError:
            return value

    def _moves(self, type: TensorType) -> Iterator[tuple[str, dict[str, object]]]:
        used = {m for a in type.axes for m in a.mesh}
        for axis in type.axes:
            for name in self.mesh.names:
                size = self.mesh.size((*axis.mesh, name))
                if name not in used and isinstance(axis.size, int) and axis.size % size == 0:
                    yield "shard", {"axis": axis.name, "mesh": (name,)}
            if axis.mesh:
                last = axis.mesh[-1:]
                yield "all_gather", {"axis": axis.name, "mesh": last}
                for target in type.axes:
                    if isinstance(target.size, int) and self._divides(target, last):
                        attrs: dict[str, object] = {
                            "mesh": last,
                            "split": target.name,
                            "gather": axis.name,
                        }
                        yield "all_to_all", attrs

    def _divides(self, axis: Axis, mesh: tuple[str, ...]) -> bool:
        return isinstance(axis.size, int) and axis.size % self.mesh.size((*axis.mesh, *mesh)) == 0


def _gathered(builder: Builder, value: Value, first: Value | None = None) -> Value:
    """Return `value`, whole on every device."""
    for axis in value.type.axes:
        if axis.mesh:
            value = builder.node("all_gather", value, axis=axis.name, mesh=axis.mesh).result
    return value


def _beside(builder: Builder, value: Value, first: Value) -> Value:
    """Return `value`, its axes split as those of `first` of the same names and sizes."""
    value = _gathered(builder, value)
    for axis in first.type.axes:
        if axis.mesh and axis.name in value.type and value.type[axis.name].size == axis.size:
            value = builder.node("shard", value, axis=axis.name, mesh=axis.mesh).result
    return value


def _erase_unused(graph: Graph, roots: Collection[Node]) -> None:
    for node in graph.walk_back():
        if node.is_dead and node not in roots:
            node.erase()
