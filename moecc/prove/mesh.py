"""Proofs that the devices of a mesh together compute the values of a graph.

A graph on a mesh has global values, and types that say how each lies on the devices.  A device at
the coordinates d of the mesh holds of a value X that is sharded along an axis the shard
X(n·part(d) + i); of a sum that is not carried out yet it holds one summand.  For each node it is
proved that, whatever values its operands have, a device that holds its shards of them computes its
shard of the result, in the way of `moecc.ir.devices`.  By induction over the nodes, and over the
runs of a scan, devices hold what every type says.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import NamedTuple

from moecc.ir.graph import Graph, Node, Value, setter_of, where
from moecc.ir.mesh import Mesh, mesh_of
from moecc.ir.operand import Attrs
from moecc.ir.ops.axes import EmbeddingOp, JoinOp
from moecc.ir.ops.collectives import CollectiveOp
from moecc.ir.ops.contraction import MeanOp
from moecc.ir.ops.repetition import ScanOp, repetitions
from moecc.ir.ops.slots import SlotsOp, is_slots
from moecc.ir.structure import local_attrs
from moecc.ir.text import format_attrs
from moecc.ir.traits import CollectiveKind
from moecc.prove.evaluation import Evaluation, Terms, shown
from moecc.prove.rules import Lemmas
from moecc.prove.shards import (
    joined_size,
    note_shards,
    number_of_shard,
    place_in_shard,
    shard_size,
    times_size,
)
from moecc.terms.tensor import Tensor, quotient, remainder
from moecc.terms.term import Abstraction, Algebra, Head, Polynomial, Size, Var
from moecc.types import Axis, Extent, TensorType

Parting = tuple[str, tuple[str, str]]
"""A node, and the terms that differ there: of the value that its type means, and of devices."""


class MisplacedError(Exception):
    """A value cannot lie on devices as its type says."""


@dataclass
class Devices:
    """Proves of graphs on meshes that devices compute their values; equal nodes are proved once.

    Attributes:
      lemmas: the lemmas, with a record of their uses.
    """

    lemmas: Lemmas = field(default_factory=lambda: Lemmas(of_shards=True))

    def __post_init__(self) -> None:
        self._evaluation = Evaluation(Algebra(self.lemmas))
        self._outcomes: dict[Hashable, _Outcome] = {}

    @property
    def algebra(self) -> Algebra:
        """What builds the terms."""
        return self._evaluation.algebra

    def parting(self, graph: Graph, infinite: Collection[Value] = ()) -> Parting | None:
        """Return the first node at which devices part from the values, or None.

        Args:
          graph: maybe on a mesh.
          infinite: the parameters that may hold infinite elements.
        """
        mesh = mesh_of(graph)
        if mesh is None:
            return None
        leaves = [*graph.inputs.values(), *(v for v in graph.params.values() if v.users)]
        for value in leaves:
            if value.type.unreduced or not _covers(value.type):
                return f"%{value.name}", ("a value that every device is given", str(value.type))
        return self._graph(graph, mesh, {v: v not in infinite for v in leaves})

    def _graph(self, graph: Graph, mesh: Mesh, finite: dict[Value, bool]) -> Parting | None:
        """Return where the nodes of a graph or a body part; adds which results are finite."""
        for node in graph:
            if node.body is not None:
                parting = self._scan(node, node.body, mesh, finite)
            else:
                parting = self._node(node, mesh, finite)
            if parting is not None:
                return parting
        return None

    def _node(self, node: Node, mesh: Mesh, finite: dict[Value, bool]) -> Parting | None:
        key = (mesh, *_key(node, finite))
        if key not in self._outcomes:
            try:
                outcome = _NodeProof(self._evaluation, mesh, finite).outcome(node)
            except MisplacedError as error:
                terms = (" ".join(str(v.type) for v in node.results), str(error))
                outcome = _Outcome((True,) * len(node.results), terms)
            self._outcomes[key] = outcome
        outcome = self._outcomes[key]
        finite.update(zip(node.results, outcome.finite, strict=True))
        return None if outcome.gap is None else (where(node), outcome.gap)

    def _scan(
        self, node: Node, body: Graph, mesh: Mesh, finite: dict[Value, bool]
    ) -> Parting | None:
        """Return where a scan parts: its body holds for every run, if it ends as it begins."""
        attrs, (axis, _) = ScanOp.of_node(node), repetitions(node.attrs)
        inputs, returned = [*body.inputs.values()], [*body.terminator.operands]
        end = attrs.carries + attrs.stacked
        pairs = [
            *((v, x, attrs.carries <= i < end) for i, (v, x) in _numbered(node.operands, inputs)),
            *((v, x, i >= attrs.carries) for i, (v, x) in _numbered(node.results, returned)),
            *((v, x, False) for _, (v, x) in _numbered(inputs[: attrs.carries], returned)),
        ]
        for outer, inner, is_stacked in pairs:
            if _placement(outer.type) != _placement(inner.type) or (
                is_stacked and outer.type[axis].mesh
            ):
                return where(node), (str(outer.type), str(inner.type))
        # A carry is finite where it is so at the start and after every run.
        carried = [finite[v] for v in node.operands[: attrs.carries]]
        while True:
            others = [finite[v] for v in node.operands[attrs.carries :]]
            inner_finite = dict(zip(inputs, [*carried, *others], strict=True))
            parting = self._graph(body, mesh, inner_finite)
            after = [inner_finite[v] for v in returned] if parting is None else []
            still = [a and b for a, b in zip(carried, after, strict=False)]
            if parting is not None or still == carried:
                break
            carried = still
        finite.update(zip(node.results, after, strict=False))
        return parting


def of_device(evaluation: Evaluation, graph: Graph) -> Terms:
    """Return what a device computes of shards of the inputs that may have any values.

    The sizes of graphs that are evaluated from now on are those of shards.

    Args:
      evaluation: of the graph's global values.
      graph: on a mesh, without bodies.

    Raises:
      MisplacedError: a value cannot lie on devices as its type says.
    """
    mesh = mesh_of(graph)
    assert mesh is not None
    program = _NodeProof(evaluation, mesh, {})
    program.unsharded = evaluation.evaluate(graph)
    for value in (*graph.inputs.values(), *graph.params.values()):
        if value in program.unsharded:
            program.shards[value] = program.shard(value)
    sizes: dict[Size, Size] = {}
    for value in graph.inputs.values():
        axes = program.shards[value].axes
        pairs = zip(program.unsharded[value].axes, axes, strict=True)
        sizes.update((v.size, w.size) for v, w in pairs)
        type = value.type.with_axes(Axis(v.name, v.size) for v in axes)
        program.shards[value] = evaluation.leaf(f"input {value.name}", type)
    for node in graph:
        program.add_shards(node)
    evaluation.sizes = sizes | program.capacities
    return program.shards


def _numbered(a: Sequence[Value], b: Sequence[Value]) -> Iterable[tuple[int, tuple[Value, Value]]]:
    return enumerate(zip(a, b, strict=False))


def _covers(type: TensorType) -> bool:
    """Return whether devices together have all of a value: each mesh axis is used once."""
    names = [*type.unreduced, *(m for a in type.axes for m in a.mesh)]
    return len(set(names)) == len(names)


def _placement(type: TensorType) -> tuple[dict[str, tuple[str, ...]], frozenset[str]]:
    return {a.name: a.mesh for a in type.axes if a.mesh}, frozenset(type.unreduced)


class _Outcome(NamedTuple):
    """What the proof of a node came to: which results are finite, and the terms that differ."""

    finite: tuple[bool, ...]
    gap: tuple[str, str] | None = None


def _assigners(node: Node) -> list[Node]:
    """Return the nodes that assign the slots that a node reads."""
    return [v.node for v in node.operands if v.node is not None and is_slots(v)]


def _key(node: Node, finite: Mapping[Value, bool]) -> Iterator[Hashable]:
    """Yield all that a proof of a node depends on, values by their numbers."""
    numbers: dict[Value, int] = {}

    def number(value: Value) -> int:
        return numbers.setdefault(value, len(numbers))

    for each in (*_assigners(node), node):
        yield each.op.name, format_attrs(each.op, each.attrs)
        for value in (*each.operands, *each.results):
            sizes = (a.size for a in value.type.axes if isinstance(a.size, Extent))
            setters = tuple((s.kind, number(setter_of(s))) for s in sizes)
            axes = tuple(a if not isinstance(a.size, Extent) else a.name for a in value.type.axes)
            meshes = (value.type.meshes, value.type.unreduced, str(value.type.dtype))
            yield number(value), axes, meshes, setters, finite.get(value)


class _NodeProof:
    """A proof of a node: its operands are unknown, its results are compared.

    Attributes:
      whole: the terms of global values.
      shards: the terms of the shards of a device, as functions of its coordinates.
      capacities: the sizes of slots of all devices by those of a device, where they are equal
        since groups are.
    """

    def __init__(self, evaluation: Evaluation, mesh: Mesh, finite: Mapping[Value, bool]) -> None:
        self.evaluation, self.algebra = evaluation, evaluation.algebra
        self.mesh, self.finite = mesh, finite
        self.unsharded: dict[Value, Tensor] = {}
        self.shards: dict[Value, Tensor] = {}
        self.capacities: dict[Size, Size] = {}
        self._setters: dict[Value, int] = {}
        self._coordinates = {n: self.algebra.axis(f"@{n}", s) for n, s in mesh.axes if s > 1}

    def outcome(self, node: Node) -> _Outcome:
        """Return whether a device computes its shard of every result."""
        for assigner in _assigners(node):
            self._run(assigner)
        self._run(node)
        finite = tuple(self.unsharded[v].finite for v in node.results)
        for value in node.results:
            expected, actual = self.shard(value), self._summed(value)
            if expected.axes != actual.axes or self._at_lone(expected) is not self._at_lone(actual):
                return _Outcome(finite, shown(expected, actual))
            allowed = {*expected.axes, *self._placing(value.type)}
            strays = [v for v in self.shards[value].body.free if v not in allowed]
            if strays or not _covers(value.type):
                return _Outcome(finite, shown(expected, self.shards[value]))
        return _Outcome(finite)

    def _at_lone(self, tensor: Tensor) -> Polynomial:
        """Return an element, at the only index of axes of one element."""
        lone = {v: self.algebra.zero for v in tensor.axes if v.size == 1}
        return self.algebra.substitute(tensor.body, lone) if lone else tensor.body

    def _placing(self, type: TensorType) -> Iterator[Var]:
        """Yield the coordinates on which a shard may depend."""
        names = (*type.unreduced, *(m for a in type.axes for m in a.mesh))
        return (self._coordinates[n] for n in names if n in self._coordinates)

    def _run(self, node: Node) -> None:
        """Add the terms of the operands that have none, and of the results."""
        for number, value in enumerate(node.operands):
            if value not in self.unsharded:
                self._add_unknown(value, self._bound_of(node, number))
        operands = [self.unsharded[v] for v in node.operands]
        axes = [self._axes(v.type) for v in node.results]
        results = self.evaluation.computed(node, operands, node.attrs, axes)
        for value, tensor in zip(node.results, results, strict=True):
            self.unsharded[value] = replace(tensor, dtype=value.type.dtype)
        self.add_shards(node)

    def add_shards(self, node: Node) -> None:
        """Add what a device computes of its shards of the operands.

        Raises:
          MisplacedError: the shards of two values do not fit.
        """
        self._check_sizes(node)
        for value, tensor in zip(node.results, self._locally(node), strict=True):
            self.shards[value] = replace(tensor, dtype=value.type.dtype)

    def _bound_of(self, node: Node, number: int) -> int | None:
        """Return the exclusive bound of the integers of an operand, which pick rows of a table."""
        index, is_sum = node.op.index, bool(node.operands[number].type.unreduced)
        if index is None or not index.strict or index.operand != number or is_sum:
            return None
        below = index.below(node)
        return below if isinstance(below, int) else None

    def _check_sizes(self, node: Node) -> None:
        """Raise MisplacedError where axes of one name and size have shards of several sizes."""
        if node.op.name in ("embedding", "join"):
            return
        sizes: dict[object, Size] = {}
        for value in node.operands:
            pairs = zip(self.unsharded[value].axes, self.shards[value].axes, strict=True)
            for axis, shard in pairs:
                if sizes.setdefault(axis, shard.size) != shard.size:
                    raise MisplacedError(f"two sizes of a shard of {axis.name!r}")

    # Values on devices.

    def _axes(self, type: TensorType) -> tuple[Var, ...]:
        return tuple(self.algebra.axis(a.name, self._size(a.size)) for a in type.axes)

    def _size(self, size: int | str | Extent) -> Size:
        if not isinstance(size, Extent):
            return size
        setter = setter_of(size)
        assignment = self.unsharded[setter].slots if setter in self.unsharded else None
        if assignment is None:
            number = self._setters.setdefault(setter, len(self._setters))
            return f"{size.kind} of setter {number}"
        return assignment.sizes[0 if size.kind == "groups" else 2]

    def _add_unknown(self, value: Value, below: int | None) -> None:
        """Add an arbitrary value: elements of a source, or sums of them over coordinates."""
        type, axes = value.type, self._axes(value.type)
        name = {"int": "integer", "bool": "holds"}.get(type.dtype.kind, "source")
        attrs = (f"operand {len(self.unsharded)}", str(type.dtype), tuple(v.size for v in axes))
        head = Head(name, (*attrs, "value")) if below is None else Head("row", (below, *attrs))
        summed = [self._coordinates[m] for m in type.unreduced if m in self._coordinates]
        indices = [self.algebra.index(v) for v in (*summed, *axes)]
        element = self.algebra.apply(head, (), indices)
        part = Tensor(self.algebra, axes, element, self.finite.get(value, True), dtype=type.dtype)
        self.unsharded[value] = replace(part, body=self._sum(element, type.unreduced))
        self.shards[value] = self._shard(part, type)

    def _shard(self, tensor: Tensor, type: TensorType) -> Tensor:
        """Return the shard of a tensor that a type gives a device."""
        axes = [self._shard_axis(v, type[v.name]) for v in tensor.axes]
        indices = {
            v.name: self.algebra.add(self._start(type[v.name].mesh, v.size), self.algebra.index(v))
            for v in axes
        }
        return tensor.moved(axes, indices)

    def _shard_axis(self, axis: Var, place: Axis) -> Var:
        parts = self.mesh.size(place.mesh)
        size = shard_size(axis.size, parts)
        if size is None:
            raise MisplacedError(f"{axis.name}={axis.size} does not divide into {parts}")
        return self.algebra.axis(axis.name, size)

    def _start(self, mesh: Sequence[str], size: Size) -> Polynomial:
        """Return where the shard of a device begins, given the size of a shard."""
        return times_size(self.algebra, self._part(mesh), size)

    def _part(self, mesh: Sequence[str]) -> Polynomial:
        """Return which of the shards that mesh axes make a device has."""
        part = self.algebra.zero
        for name in mesh:
            part = self.algebra.scale(part, self.mesh.sizes[name])
            if name in self._coordinates:
                part = self.algebra.add(part, self.algebra.index(self._coordinates[name]))
        return part

    def _sum(self, body: Polynomial, mesh: Sequence[str]) -> Polynomial:
        """Return the sum over the coordinates along mesh axes."""
        fresh = {v: self.algebra.fresh(v) for m in mesh if (v := self._coordinates.get(m))}
        values = {v: self.algebra.index(w) for v, w in fresh.items()}
        inner = self.algebra.substitute(body, values)
        return self.algebra.multiply(inner, over=tuple(fresh.values())) if fresh else body

    def shard(self, value: Value) -> Tensor:
        """Return the shard of a device of a global value."""
        return self._shard(self.unsharded[value], value.type)

    def _summed(self, value: Value) -> Tensor:
        shard = self.shards[value]
        return replace(shard, body=self._sum(shard.body, value.type.unreduced))

    # What a device does.

    def _locally(self, node: Node) -> Sequence[Tensor]:
        """Return the results of a device on its shards, as `moecc.ir.devices` computes them."""
        operands = [self.shards[v] for v in node.operands]
        if node.op.collective is CollectiveKind.ANY:
            return [self.shard(node.result)]
        if node.op.collective is not None:
            return [self._exchanged(node, operands[0])]
        if node.op.name in ("random_uniform", "random_normal"):
            return [self._random(node, operands[1])]
        special = _SPECIAL.get(node.op.name)
        if special is not None:
            return [special(self, node, operands)]
        if node.op.name in ("convolve", "update_slice"):
            return [self._apart(node)]
        if node.op.assigns_slots or node.op.name == "group_sum":
            self._note_groups(node)
        results = self._plain(node, operands)
        if not node.op.assigns_slots:
            return results
        return [*results[:-1], self._with_sizes(node, results[-1])]

    def _plain(self, node: Node, operands: Sequence[Tensor]) -> Sequence[Tensor]:
        axes = [
            tuple(self._shard_axis(v, value.type[v.name]) for v in self.unsharded[value].axes)
            for value in node.results
        ]
        attrs = local_attrs(node, self.mesh)
        return self.evaluation.computed(node, operands, attrs, axes)

    def _note_groups(self, node: Node) -> None:
        """Note the functions of tokens that belong to a shard of the groups."""
        slots = next((v for v in (*node.results, *node.operands) if is_slots(v)), None)
        assignment = self.unsharded[slots].slots if slots is not None else None
        if slots is None or slots.node is None or assignment is None:
            return
        tokens = SlotsOp.of_node(slots.node).tokens
        token_axis = slots.type[tokens[0]]
        if self.mesh.size(token_axis.mesh) == 1:
            return
        functions = assignment.operands
        if node.op.name == "group_sum":
            functions = (self.unsharded[node.operands[0]].along(*tokens),)
        first = self._shard_axis(assignment.tokens[0], token_axis)
        start = self._start(token_axis.mesh, first.size)
        shards = [self._from(f, first.size, start) for f in functions]
        note_shards(self.algebra, shards, self._part(token_axis.mesh), functions)

    def _from(self, function: Abstraction, size: Size, start: Polynomial) -> Abstraction:
        """Return a function of tokens at the tokens of a shard; other axes are whole."""
        others = function.variables[1:]
        variables = [self.algebra.fresh(size), *map(self.algebra.fresh, others)]
        at, *inner = map(self.algebra.index, variables)
        body = self.algebra.instantiate(function, [self.algebra.add(start, at), *inner])
        # What else varies is sharded as the value is.
        return self.algebra.abstract(variables, body)

    def _with_sizes(self, node: Node, slots: Tensor) -> Tensor:
        """Return slots of a device; rows have as many slots as on all devices together."""
        unsharded = self.unsharded[node.results[-1]].slots
        if unsharded is None or slots.slots is None:
            return slots
        sizes = (slots.slots.sizes[0], slots.slots.sizes[1], unsharded.sizes[2])
        if not unsharded.ragged:
            self.capacities[slots.slots.sizes[2]] = sizes[2]
        return replace(slots, slots=replace(slots.slots, sizes=sizes))

    def _random(self, node: Node, like: Tensor) -> Tensor:
        """Return the shard of the numbers of all devices, of the axes that a device has."""
        expected = self.shard(node.result)
        if expected.axes != like.axes:
            raise MisplacedError(f"random numbers for {like.axes}")
        return expected

    def _apart(self, node: Node) -> Tensor:
        """Return the shard of the result along axes whose elements the operation does not mix."""
        mixed, unsharded = node.mixes, self.unsharded[node.result]
        meshes: dict[str, tuple[str, ...]] = {}
        for axis in (a for v in node.operands for a in v.type.axes):
            mesh = meshes.setdefault(axis.name, axis.mesh)
            is_apart = axis.name not in mixed and unsharded.has(axis.name)
            if mesh != axis.mesh or (mesh and not is_apart):
                raise MisplacedError(f"{node.op.name} of shards along {axis.name!r}")
        axes = [Axis(v.name, 0, meshes.get(v.name, ())) for v in unsharded.axes]
        return self._shard(unsharded, TensorType(node.result.type.dtype, tuple(axes)))

    def _exchanged(self, node: Node, x: Tensor) -> Tensor:
        """Return the result of a collective on a device."""
        attrs: Attrs = node.attrs
        over = CollectiveOp.of_node(node).mesh
        match node.op.name:
            case "shard":
                return self._block(x, attrs["axis"], over)
            case "all_gather":
                return self._joined(x, attrs["axis"], over)
            case "all_reduce":
                return replace(x, body=self._sum(x.body, over))
            case "reduce_scatter":
                return self._block(replace(x, body=self._sum(x.body, over)), attrs["axis"], over)
        return self._block(self._joined(x, attrs["gather"], over), attrs["split"], over)

    def _block(self, x: Tensor, name: str, over: Sequence[str]) -> Tensor:
        """Return the block of an axis that a device takes of equal ones."""
        axis = self._shard_axis(x.axis(name), Axis(name, 0, tuple(over)))
        at = self.algebra.add(self._start(over, axis.size), self.algebra.index(axis))
        return x.moved((axis if v.name == name else v for v in x.axes), {name: at})

    def _joined(self, x: Tensor, name: str, over: Sequence[str]) -> Tensor:
        """Return the blocks of the devices along mesh axes, one after the other."""
        size = x.axis(name).size
        if self.mesh.size(over) == 1:
            return x
        whole_size = joined_size(size, self.mesh.size(over))
        if whole_size is None:
            raise MisplacedError(f"{name}={size} is no shard of {'*'.join(over)}")
        axis = self.algebra.axis(name, whole_size)
        index = self.algebra.index(axis)
        if isinstance(size, int):
            part, remaining = (
                quotient(self.algebra, index, size),
                remainder(self.algebra, index, size),
            )
        else:
            part = number_of_shard(self.algebra, index, size)
            remaining = place_in_shard(self.algebra, index, size)
        values, inner = {x.axis(name): remaining}, self.mesh.size(over)
        split = [m for m in over if m in self._coordinates]
        for mesh_axis in split:
            inner //= self.mesh.sizes[mesh_axis]
            digit = quotient(self.algebra, part, inner)
            if mesh_axis != split[0]:
                digit = remainder(self.algebra, digit, self.mesh.sizes[mesh_axis])
            values[self._coordinates[mesh_axis]] = digit
        axes = tuple(axis if v.name == name else v for v in x.axes)
        return replace(x, axes=axes, body=self.algebra.substitute(x.body, values), slots=None)

    def _positions(self, node: Node, operands: Sequence[Tensor]) -> Tensor:
        (tensor,) = self._plain(node, operands)
        (axis,) = tensor.axes
        start = self._start(node.result.type[axis.name].mesh, axis.size)
        return tensor.with_body(self.algebra.add(start, tensor.body))

    def _mean(self, node: Node, operands: Sequence[Tensor]) -> Tensor:
        type, (tensor,) = node.operands[0].type, self._plain(node, operands)
        parts = self.mesh.size(m for n in MeanOp.of_node(node).axes for m in type[n].mesh)
        return tensor.with_body(self.algebra.scale(tensor.body, Fraction(1, parts)))

    def _join(self, node: Node, operands: Sequence[Tensor]) -> Tensor:
        """Return joined chunks, whose pieces take turns although a device may have one part."""
        join = JoinOp(local_attrs(node, self.mesh))
        if JoinOp.of_node(node).parts == 1 or not join.parts:
            return self._plain(node, operands)[0]
        return join.in_turns(self.algebra, operands)

    def _embedding(self, node: Node, operands: Sequence[Tensor]) -> Tensor:
        """Return the rows of the shard of the table, and 0 for other rows."""
        table, ids = operands
        name = EmbeddingOp.of_node(node).axis
        if not (mesh := node.operands[0].type[name].mesh):
            return self._plain(node, operands)[0]
        row, inside = self._in_shard(ids.body, mesh, table.axis(name).size)
        (rows,) = self._plain(node, [table, ids.with_body(row)])
        return rows.with_body(self.algebra.multiply(inside, rows.body))

    def _combine(self, node: Node, operands: Sequence[Tensor]) -> Tensor:
        """Return the sum that the experts of the device add to each token."""
        rows, experts, slots, *gates = operands
        mesh, assignment = node.operands[0].type["expert"].mesh, slots.slots
        if not mesh or assignment is None:
            return self._plain(node, operands)[0]
        size = rows.axis("expert").size
        expert, inside = self._in_shard(assignment.experts, mesh, size)
        placed = self.algebra.multiply(inside, assignment.placed)
        local_slots = replace(slots, slots=replace(assignment, experts=expert, placed=placed))
        return self._plain(node, [rows, experts, local_slots, *gates])[0]

    def _in_shard(
        self, index: Polynomial, mesh: Sequence[str], size: Size
    ) -> tuple[Polynomial, Polynomial]:
        """Return an index within the shard of a device, and whether it is there."""
        at = self.algebra.subtract(index, self._start(mesh, size))
        return at, self.algebra.apply(Head("range", (0, size)), (), [at])


_SPECIAL: dict[str, Callable[[_NodeProof, Node, Sequence[Tensor]], Tensor]] = {
    "positions": _NodeProof._positions,
    "mean": _NodeProof._mean,
    "join": _NodeProof._join,
    "embedding": _NodeProof._embedding,
    "combine": _NodeProof._combine,
    "combine_weighted": _NodeProof._combine,
}
"""Operations whose result depends on the coordinates of a device."""
