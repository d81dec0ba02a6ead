"""Simulate a graph on a mesh: every device holds its local shards, and collectives move them.

It defines the meaning of a sharded graph, as the interpreter defines it for the global
values; that both agree is the law of sharding.  Every collective counts the bytes that each
device sends, in the declared element type: in a gather, the others' shards; in a reduction, twice
those of a gather of the same value; in an exchange, what goes to other devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from moecc.errors import InputError, Problem
from moecc.ir.arrays import NOTHING, Array, Data, poison, stored
from moecc.ir.graph import Graph, Node, Value, setter_of, where
from moecc.ir.interpreter import bind
from moecc.ir.mesh import Coordinates, Mesh, required_mesh
from moecc.ir.operand import Attrs
from moecc.ir.ops.axes import EmbeddingOp
from moecc.ir.ops.collectives import CollectiveOp
from moecc.ir.ops.contraction import MeanOp
from moecc.ir.ops.repetition import ScanOp, picked, repetitions, stacked_along
from moecc.ir.ops.routing import WithinBufferOp
from moecc.ir.ops.slots import SlotsOp
from moecc.ir.structure import local_attrs, local_size
from moecc.ir.traits import CollectiveKind
from moecc.support.lazy import np
from moecc.types import Arrays, TensorType

Parts = dict[Coordinates, Array]
"""The local shard of one value on each device."""

Sent = dict[Coordinates, int]
Rows = Callable[[TensorType, Coordinates], Data]
"""The slots in use of a device's shard of ragged rows, ``[group, expert]``."""


def _block(x: Array, axis: str, part: int, parts: int) -> Array:
    """Return block `part` of the `parts` equal blocks of `x` along `axis`."""
    at = x.axes.index(axis)
    size = x.data.shape[at] // parts
    return replace(x, data=x.data.take(range(part * size, (part + 1) * size), at), assignment=None)


def _concatenated(pieces: list[Array], axis: str) -> Array:
    at = pieces[0].axes.index(axis)
    return replace(pieces[0], data=np.concatenate([p.data for p in pieces], at), assignment=None)


def added(parts: list[Data]) -> Data:
    """Return the sum of the devices' data, in device order; of opposite infinities it is NaN."""
    total = parts[0]
    with np.errstate(invalid="ignore"):
        for part in parts[1:]:
            total = total + part
    return total


def exchange(node: Node, x: Parts, mesh: Mesh, rows: Rows) -> tuple[Parts, Sent]:
    """Return the results of a collective, and the number of elements each device sends to others.

    A ring of n devices sends (n − 1)/n of the global value in a gather or a reduce-scatter, and
    twice that in an all-reduce; an exchange sends what is not for the device itself.
    """
    attrs: Attrs = node.attrs
    over = CollectiveOp.of_node(node).mesh
    n, peers = mesh.size(over), {d: [x[p] for p in mesh.peers(d, over)] for d in x}

    def block(d: Coordinates, data: Array, axis: str) -> Array:
        return _block(data, axis, mesh.part(d, over), n)

    share = {d: a.data.size * (n - 1) // n for d, a in x.items()}
    if node.op.name == "shard":
        return {d: block(d, a, attrs["axis"]) for d, a in x.items()}, dict.fromkeys(x, 0)
    if node.op.name == "all_gather":
        parts = {d: _concatenated(peers[d], attrs["axis"]) for d in x}
        return parts, {d: a.data.size * (n - 1) for d, a in x.items()}
    if node.op.collective is CollectiveKind.BRINGS:
        sums = {d: replace(a, data=added([p.data for p in peers[d]])) for d, a in x.items()}
        if node.op.name == "all_reduce":
            return sums, {d: 2 * a.data.size * (n - 1) // n for d, a in x.items()}
        return {d: block(d, a, attrs["axis"]) for d, a in sums.items()}, share
    split = attrs["split"]
    pieces = {d: [block(d, p, split) for p in peers[d]] for d in x}
    parts = {d: _concatenated(pieces[d], attrs["gather"]) for d in x}
    type = node.operands[0].type
    if type.ragged is not None:
        # The occupied rows are sent; every device has room for the same number of slots.
        for d, a in x.items():
            extents = Array(rows(type, d), ("group", "expert"))
            leaving = int(extents.data.sum() - block(d, extents, split).data.sum())
            row = [a.size(n) for n in a.axes if n not in ("group", "expert", type.ragged.name)]
            share[d] = leaving * int(np.prod(row))
    return parts, share


# One operation on one device: its meaning on local shards, given the device's coordinates.


def _plain(node: Node, operands: list[Array], mesh: Mesh) -> Array:
    (result,) = node.op.evaluate(operands, local_attrs(node, mesh))
    return result


def _positions(node: Node, operands: list[Array], at: Coordinates, mesh: Mesh) -> Array:
    (axis,) = node.result.type.axes
    size = operands[0].size(axis.name)
    return Array(np.arange(size) + mesh.part(at, axis.mesh) * size, (axis.name,))


def _random(node: Node, operands: list[Array], at: Coordinates, mesh: Mesh) -> Array:
    """Draw the global numbers, of which a device keeps its shard."""
    key, like = operands
    axes = [node.result.type[n] for n in like.axes]
    shape = [s * mesh.size(a.mesh) for s, a in zip(like.data.shape, axes, strict=True)]
    (numbers,) = node.op.evaluate([key, Array(np.empty(shape), like.axes)], node.attrs)
    data = numbers.data
    for number, axis in enumerate(axes):
        size = like.data.shape[number]
        start = mesh.part(at, axis.mesh) * size
        data = data.take(range(start, start + size), number)
    return Array(data, like.axes)


def _mean(node: Node, operands: list[Array], at: Coordinates, mesh: Mesh) -> Array:
    """Return this device's share of the mean: the sum of its shard over the global size."""
    type = node.operands[0].type
    parts = mesh.size(m for n in MeanOp.of_node(node).axes for m in type[n].mesh)
    return _plain(node, operands, mesh).map(lambda d: d / parts)


def _embedding(node: Node, operands: list[Array], at: Coordinates, mesh: Mesh) -> Array:
    """Return the rows of this device's shard, and zeros for the others."""
    table, ids = operands
    axis = node.operands[0].type[EmbeddingOp.of_node(node).axis]
    size = table.size(axis.name)
    if not axis.mesh:
        return _plain(node, operands, mesh)
    there = ids.data != NOTHING
    index = np.where(there, ids.data - mesh.part(at, axis.mesh) * size, 0)
    mine = (index >= 0) & (index < size)
    picked = replace(ids, data=np.where(mine, index, 0))
    rows = _plain(node, [table, picked], mesh)
    mask = Array(mine, ids.axes).to(rows.axes)
    return rows.map(lambda d: np.where(mask, d, 0))


def _combine(node: Node, operands: list[Array], at: Coordinates, mesh: Mesh) -> Array:
    """Return the contribution of this device's experts to each token."""
    rows, experts, slots, *gates = operands
    axis = node.operands[0].type["expert"]
    size = rows.size("expert")
    index = experts.data - mesh.part(at, axis.mesh) * size
    mine = (index >= 0) & (index < size)
    local_slots = replace(
        slots, data=np.where(Array(mine, experts.axes).to(slots.axes), slots.data, -1)
    )
    return _plain(node, [rows, replace(experts, data=index), local_slots, *gates], mesh)


def _within_buffer(node: Node, operands: list[Array], at: Coordinates, mesh: Mesh) -> Array:
    """Return which of this device's choices fit, from the counts of all that exchange rows."""
    experts, slots, counts = operands
    attrs = WithinBufferOp(local_attrs(node, mesh))
    tokens = node.operands[0].type[attrs.tokens[0]].mesh
    over = tokens[len(node.operands[2].type["group"].mesh) :]
    groups = counts.size("group") // mesh.size(over)
    first = mesh.part(at, over) * groups
    return attrs.kept_from(experts, slots, counts, first=first, groups=groups)


_LOCAL: dict[str, Callable[[Node, list[Array], Coordinates, Mesh], Array]] = {
    "positions": _positions,
    "random_uniform": _random,
    "random_normal": _random,
    "mean": _mean,
    "embedding": _embedding,
    "combine": _combine,
    "combine_weighted": _combine,
    "within_buffer": _within_buffer,
}
"""Operations whose result depends on the coordinates of the device."""


def run_local(node: Node, operands: list[Array], at: Coordinates, mesh: Mesh) -> tuple[Array, ...]:
    """Return the results of `node` on the device at `at`, from its local shards of the operands."""
    function = _LOCAL.get(node.op.name)
    if function is not None:
        return (function(node, operands, at, mesh),)
    return node.op.evaluate(operands, local_attrs(node, mesh))


T = TypeVar("T")


@dataclass(frozen=True)
class Traffic:
    """The traffic of one collective.

    Attributes:
      op: the collective.
      mesh: the mesh axes that it ran over.
      where: its description in messages.
      sent_bytes: what each device sent, in the order of the devices.
    """

    op: str
    mesh: tuple[str, ...]
    where: str
    sent_bytes: tuple[int, ...]


@dataclass
class Run:
    """The results of a graph on every device of its mesh.

    Attributes:
      mesh: the mesh.
      outputs: the global outputs, assembled from their shards.
      traffic: the traffic, in order; a ``shard`` sends nothing.
      held: for each requested value, the local shard of each device.
    """

    mesh: Mesh
    outputs: dict[str, Data] = field(default_factory=dict)
    traffic: list[Traffic] = field(default_factory=list)
    held: dict[Value, Parts] = field(default_factory=dict)

    @property
    def sent_bytes(self) -> dict[str, int]:
        """The bytes sent by the device that sends most, by collective."""
        total: dict[str, np.ndarray[tuple[int], np.dtype[np.int64]]] = {}
        for traffic in self.traffic:
            total[traffic.op] = total.get(
                traffic.op, np.zeros(self.mesh.devices, np.int64)
            ) + np.asarray(traffic.sent_bytes)
        return {op: int(sent.max()) for op, sent in total.items()}


def simulate(graph: Graph, params: Arrays, inputs: Arrays) -> Run:
    """Run `graph` on every device of its mesh, and count the traffic.

    Args:
      graph: a graph sharded on a mesh.
      params: the global parameters by name.
      inputs: the global inputs by name.

    Raises:
      InputError: the graph has no mesh, or a ``reshard`` that is not lowered; an array is
        missing or does not match its type; a size known only at run time does not divide.
    """
    mesh = required_mesh(graph)
    left = [n for n in graph.every_node() if n.op.collective is CollectiveKind.ANY]
    if left:
        message = "a reshard is not lowered to collectives yet"
        raise InputError([Problem(message, where(n), hint="lower-collectives first") for n in left])
    return _Simulator(mesh, Run(mesh)).run(graph, params, inputs)


class _Simulator:
    """The state of one run.

    Attributes:
      held: the local shards of every value computed so far.
      extents: for each ``assign_slots`` value, the global slots in use, ``[group, expert]``.
    """

    def __init__(self, mesh: Mesh, result: Run) -> None:
        self.mesh = mesh
        self.held: dict[Value, Parts] = {}
        self.extents: dict[Value, Data] = {}
        self.result = result

    def run(self, graph: Graph, params: Arrays, inputs: Arrays) -> Run:
        """Run `graph` on shards of the global arrays."""
        for value, data in bind(graph, params, inputs).items():
            array = Array(stored(data, value.type.dtype), value.type.names, value.type.dtype)
            self.held[value] = self._at(f"%{value.name}", partial(self._cut, array, value))
        self._walk(graph)
        for name, value in graph.outputs.items():
            self.result.outputs[name] = assembled(value.type, self.held[value], self.mesh).data
        self.result.held = self.held
        return self.result

    def body(self, graph: Graph, inputs: Sequence[Parts]) -> list[Parts]:
        """Run the body of a ``scan`` once, and return the shards of its outputs."""
        self.held.update(zip(graph.inputs.values(), inputs, strict=True))
        self._walk(graph)
        return [self.held[v] for v in graph.terminator.operands]

    def _walk(self, graph: Graph) -> None:
        for node in graph:
            self._at(where(node), partial(self._step, node))

    def _at(self, location: str, action: Callable[[], T]) -> T:
        try:
            with np.errstate(all="ignore"):
                return action()
        except InputError as error:
            raise InputError(replace(p, where=location) for p in error.problems) from None

    def _cut(self, array: Array, value: Value) -> Parts:
        return {d: cut(array, value.type, d, self.mesh) for d in self.mesh.coordinates()}

    def _step(self, node: Node) -> Parts:
        if node.body is not None:
            self.held.update(zip(node.results, self._repeated(node, node.body), strict=True))
        elif node.op.collective is None:
            for number, parts in enumerate(self._locally(node)):
                self.held[node.results[number]] = parts
        else:
            self._exchange(node, exchange(node, self.held[node.operands[0]], self.mesh, self._rows))
        self._note_extents(node)
        for value in node.results:
            self.held[value] = self._finished(value)
        return self.held[node.results[0]]

    def _locally(self, node: Node) -> Iterator[Parts]:
        by_device = {
            d: run_local(node, [self.held[v][d] for v in node.operands], d, self.mesh)
            for d in self.mesh.coordinates()
        }
        for number in range(len(node.results)):
            yield {d: results[number] for d, results in by_device.items()}

    def _repeated(self, node: Node, body: Graph) -> list[Parts]:
        """Run the body of a ``scan`` for each position, on all devices in step."""
        (axis, runs), attrs = repetitions(node.attrs), ScanOp.of_node(node)
        carries, end = attrs.carries, attrs.carries + attrs.stacked
        operands = [self.held[v] for v in node.operands]
        carried, collected = operands[:carries], []
        for at in range(runs):
            now = [{d: picked(a, axis, at) for d, a in p.items()} for p in operands[carries:end]]
            inner = _Simulator(self.mesh, self.result)
            results = inner.body(body, [*carried, *now, *operands[end:]])
            carried = results[:carries]
            collected.append(results[carries:])
        stacks = zip(*collected, strict=True)
        return [
            *carried,
            *({d: stacked_along(axis, *(p[d] for p in s)) for d in s[0]} for s in stacks),
        ]

    def _exchange(self, node: Node, done: tuple[Parts, Sent]) -> None:
        self.held[node.result], sent = done
        size = node.result.type.dtype.itemsize_bytes
        total = tuple(sent[d] * size for d in self.mesh.coordinates())
        if node.op.collective is not CollectiveKind.LOCAL:
            mesh = CollectiveOp.of_node(node).mesh
            self.result.traffic.append(Traffic(node.op.name, mesh, where(node), total))

    def _note_extents(self, node: Node) -> None:
        """Assemble the extents of an ``assign_slots`` from those counted by the devices."""
        value = node.results[-1]
        held = self.held[value]
        assignments = {d: p for d, a in held.items() if (p := a.assignment) is not None}
        if len(assignments) < len(held):
            return
        outermost = value.type[SlotsOp.of_node(node).tokens[0]]
        by_part = {self.mesh.part(d, outermost.mesh): p for d, p in assignments.items()}
        counted = [by_part[i].extents for i in sorted(by_part)]
        self.extents[value] = np.concatenate(counted)

    def _rows(self, type: TensorType, at: Coordinates) -> Data:
        """Return the slots in use of the device's shard of ragged rows, ``[group, expert]``."""
        (slots,) = {setter_of(e) for e in type.extents if e.kind == "ragged"}
        extents = Array(self.extents[slots], ("group", "expert"))
        axes = tuple(a for a in type.axes if a.name in ("group", "expert"))
        return cut(extents, type.with_axes(axes), at, self.mesh).to(("group", "expert"))

    def _finished(self, value: Value) -> Parts:
        """Return the shards of `value` with its type, and with nothing beyond ragged extents."""
        parts = {d: replace(a, dtype=value.type.dtype) for d, a in self.held[value].items()}
        ragged = value.type.ragged
        if ragged is None or not {"group", "expert"} <= set(value.type.names):
            return parts
        return {d: self._emptied(a, value.type, d, ragged.name) for d, a in parts.items()}

    def _emptied(self, x: Array, type: TensorType, at: Coordinates, slot: str) -> Array:
        """Return `x` with as many slots as the global value, and nothing beyond the extents."""
        (slots,) = {setter_of(e) for e in type.extents if e.kind == "ragged"}
        x = _with_slots(x, slot, int(self.extents[slots].max(initial=0)))
        extents = self._rows(type, at)
        beyond = np.arange(x.size(slot)) >= extents[..., None]
        mask = Array(beyond, ("group", "expert", slot)).to(x.axes)
        return replace(x, data=np.where(mask, poison(x.data), x.data).astype(x.data.dtype))


def _with_slots(x: Array, slot: str, size: int) -> Array:
    at = x.axes.index(slot)
    missing = max(0, size - x.data.shape[at])
    widths = [(0, missing if i == at else 0) for i in range(x.data.ndim)]
    return replace(x, data=np.pad(x.data, widths))


def cut(array: Array, type: TensorType, at: Coordinates, mesh: Mesh) -> Array:
    """Return the local shard of `array`, a global value of `type`, on the device at `at`.

    Raises:
      InputError: an axis does not divide.
    """
    data = array.data
    for number, name in enumerate(array.axes):
        axis = type[name]
        if axis.mesh:
            size = local_size(axis, data.shape[number], mesh)
            start = mesh.part(at, axis.mesh) * size
            data = data.take(range(start, start + size), number)
    return replace(array, data=data)


def assembled(type: TensorType, parts: Mapping[Coordinates, Array], mesh: Mesh) -> Array:
    """Return the global value of `type` assembled from the shards of every device.

    Raises:
      AssertionError: devices that should hold the same shard hold different ones.
    """
    first = next(iter(parts.values()))
    reduced = _summed(type, parts, mesh) if type.unreduced else dict(parts)
    at = {a.name: a.mesh for a in type.axes}
    places = {d: tuple(mesh.part(d, at[n]) for n in first.axes) for d in reduced}
    by_place: dict[tuple[int, ...], Array] = {}
    for device, block in places.items():
        copy = by_place.setdefault(block, reduced[device])
        same = np.array_equal(
            copy.data, reduced[device].data, equal_nan=copy.data.dtype.kind == "f"
        )
        assert same, f"devices hold different copies of a value of {type}"
    return replace(first, data=_joined(by_place, tuple(mesh.size(at[n]) for n in first.axes)))


def _summed(type: TensorType, parts: Mapping[Coordinates, Array], mesh: Mesh) -> Parts:
    return {
        d: replace(a, data=added([parts[p].data for p in mesh.peers(d, type.unreduced)]))
        for d, a in parts.items()
    }


def _joined(by_place: Mapping[tuple[int, ...], Array], counts: tuple[int, ...]) -> Data:
    """Return blocks concatenated along every axis, given their number along each."""
    blocks = {block: a.data for block, a in by_place.items()}
    for number in reversed(range(len(counts))):
        heads = dict.fromkeys(block[:number] for block in blocks)
        blocks = {
            h: np.concatenate([blocks[*h, i] for i in range(counts[number])], number) for h in heads
        }
    return blocks[()]
