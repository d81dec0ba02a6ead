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

import numpy as np

from moecc.errors import InputError, Problem
from moecc.ir.attributes import CollectiveAttrs, ScanAttrs, SlotAttrs
from moecc.ir.graph import Graph, Node, Value, setter_of, where
from moecc.ir.mesh import Coordinates, Mesh, mesh_of
from moecc.ir.structure import local_size
from moecc.ir.table.repetition import repetitions
from moecc.ir.traits import Collective
from moecc.types import Arrays, TensorType
from moecc_backends.reference.arrays import Array, Data
from moecc_backends.reference.elementwise import stored
from moecc_backends.reference.exchange import EXCHANGES, Parts, Sent, added
from moecc_backends.reference.interpreter import bind
from moecc_backends.reference.on_device import run_local
from moecc_backends.reference.repetition import picked, stacked_along
from moecc_backends.reference.slots import poison

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
        for one in self.traffic:
            total[one.op] = total.get(one.op, np.zeros(self.mesh.devices, np.int64)) + np.asarray(
                one.sent_bytes
            )
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
    mesh = mesh_of(graph)
    if mesh is None:
        raise InputError("the graph has no mesh", hint="annotate-sharding shards it on one")
    left = [n for n in graph.every_node() if n.op.collective is Collective.ANY]
    if left:
        what = "a reshard is not lowered to collectives yet"
        raise InputError([Problem(what, where(n), hint="lower-collectives first") for n in left])
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
            whole = Array(stored(data, value.type.dtype), value.type.names, value.type.dtype)
            self.held[value] = self._at(f"%{value.name}", partial(self._cut, whole, value))
        self._walk(graph)
        for name, value in graph.outputs.items():
            self.result.outputs[name] = assembled(value.type, self.held[value], self.mesh).data
        self.result.held = self.held
        return self.result

    def body(self, graph: Graph, given: Sequence[Parts]) -> list[Parts]:
        """Run the body of a ``scan`` once, and return the shards of its outputs."""
        self.held.update(zip(graph.inputs.values(), given, strict=True))
        self._walk(graph)
        return [self.held[v] for v in graph.terminator.operands]

    def _walk(self, graph: Graph) -> None:
        for node in graph:
            self._at(where(node), partial(self._step, node))

    def _at(self, place: str, action: Callable[[], T]) -> T:
        try:
            with np.errstate(all="ignore"):
                return action()
        except InputError as error:
            raise InputError(replace(p, where=place) for p in error.problems) from None

    def _cut(self, whole: Array, value: Value) -> Parts:
        return {d: cut(whole, value.type, d, self.mesh) for d in self.mesh.coordinates()}

    def _step(self, node: Node) -> Parts:
        exchange = EXCHANGES.get(node.op.name)
        if node.body is not None:
            self.held.update(zip(node.results, self._repeated(node, node.body), strict=True))
        elif exchange is None:
            for number, parts in enumerate(self._locally(node)):
                self.held[node.results[number]] = parts
        else:
            self._exchange(node, exchange(node, self.held[node.operands[0]], self.mesh, self._rows))
        self._note_extents(node)
        for value in node.results:
            self.held[value] = self._finished(value)
        return self.held[node.results[0]]

    def _locally(self, node: Node) -> Iterator[Parts]:
        made = {
            d: run_local(node, [self.held[v][d] for v in node.operands], d, self.mesh)
            for d in self.mesh.coordinates()
        }
        for number in range(len(node.results)):
            yield {d: results[number] for d, results in made.items()}

    def _repeated(self, node: Node, body: Graph) -> list[Parts]:
        """Run the body of a ``scan`` for each position, on all devices in step."""
        (axis, runs), attrs = repetitions(node.attrs), ScanAttrs.of_node(node)
        carries, end = attrs.carries, attrs.carries + attrs.stacked
        given = [self.held[v] for v in node.operands]
        carried, collected = given[:carries], []
        for at in range(runs):
            now = [{d: picked(a, axis, at) for d, a in p.items()} for p in given[carries:end]]
            inner = _Simulator(self.mesh, self.result)
            made = inner.body(body, [*carried, *now, *given[end:]])
            carried = made[:carries]
            collected.append(made[carries:])
        stacks = zip(*collected, strict=True)
        return [
            *carried,
            *({d: stacked_along(axis, *(p[d] for p in s)) for d in s[0]} for s in stacks),
        ]

    def _exchange(self, node: Node, done: tuple[Parts, Sent]) -> None:
        self.held[node.result], sent = done
        size = node.result.type.dtype.itemsize_bytes
        total = tuple(sent[d] * size for d in self.mesh.coordinates())
        if node.op.collective is not Collective.LOCAL:
            mesh = CollectiveAttrs.of_node(node).mesh
            self.result.traffic.append(Traffic(node.op.name, mesh, where(node), total))

    def _note_extents(self, node: Node) -> None:
        """Assemble the extents of an ``assign_slots`` from those counted by the devices."""
        value = node.results[-1]
        held = self.held[value]
        found = {d: p for d, a in held.items() if (p := a.assignment) is not None}
        if len(found) < len(held):
            return
        outermost = value.type[SlotAttrs.of_node(node).tokens[0]]
        by_part = {self.mesh.part(d, outermost.mesh): p for d, p in found.items()}
        counted = [by_part[i].extents for i in sorted(by_part)]
        self.extents[value] = np.concatenate(counted)

    def _rows(self, type: TensorType, at: Coordinates) -> Data:
        """Return the slots in use of the device's shard of ragged rows, ``[group, expert]``."""
        (place,) = {setter_of(e) for e in type.extents if e.kind == "ragged"}
        whole = Array(self.extents[place], ("group", "expert"))
        kept = tuple(a for a in type.axes if a.name in ("group", "expert"))
        return cut(whole, type.with_axes(kept), at, self.mesh).to(("group", "expert"))

    def _finished(self, value: Value) -> Parts:
        """Return the shards of `value` with its type, and with nothing beyond ragged extents."""
        parts = {d: replace(a, dtype=value.type.dtype) for d, a in self.held[value].items()}
        ragged = value.type.ragged
        if ragged is None or not {"group", "expert"} <= set(value.type.names):
            return parts
        return {d: self._emptied(a, value.type, d, ragged.name) for d, a in parts.items()}

    def _emptied(self, x: Array, type: TensorType, at: Coordinates, slot: str) -> Array:
        """Return `x` with as many slots as the global value, and nothing beyond the extents."""
        (place,) = {setter_of(e) for e in type.extents if e.kind == "ragged"}
        x = _with_slots(x, slot, int(self.extents[place].max(initial=0)))
        extents = self._rows(type, at)
        beyond = np.arange(x.size(slot)) >= extents[..., None]
        mask = Array(beyond, ("group", "expert", slot)).to(x.axes)
        return replace(x, data=np.where(mask, poison(x.data), x.data).astype(x.data.dtype))


def _with_slots(x: Array, slot: str, size: int) -> Array:
    at = x.axes.index(slot)
    missing = max(0, size - x.data.shape[at])
    widths = [(0, missing if i == at else 0) for i in range(x.data.ndim)]
    return replace(x, data=np.pad(x.data, widths))


def cut(whole: Array, type: TensorType, at: Coordinates, mesh: Mesh) -> Array:
    """Return the local shard of `whole`, a global value of `type`, on the device at `at`.

    Raises:
      InputError: an axis does not divide.
    """
    data = whole.data
    for number, name in enumerate(whole.axes):
        axis = type[name]
        if axis.mesh:
            size = local_size(axis, data.shape[number], mesh)
            start = mesh.part(at, axis.mesh) * size
            data = data.take(range(start, start + size), number)
    return replace(whole, data=data)


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
    for device, place in places.items():
        other = by_place.setdefault(place, reduced[device])
        same = np.array_equal(
            other.data, reduced[device].data, equal_nan=other.data.dtype.kind == "f"
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
    blocks = {place: a.data for place, a in by_place.items()}
    for number in reversed(range(len(counts))):
        heads = dict.fromkeys(place[:number] for place in blocks)
        blocks = {
            h: np.concatenate([blocks[*h, i] for i in range(counts[number])], number) for h in heads
        }
    return blocks[()]
