"""Meshes: named axes of devices, and checks that the types of a graph can be sharded over one.

The text of a mesh is ``data:8,model:4``, or with an equals sign; a graph keeps it as its attribute
``mesh``.  Devices are numbered with the last axis fastest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from math import prod
from typing import NamedTuple, Protocol

from moecc.errors import InputError, Problem, nearest
from moecc.ir.operand import Attrs, Operand, OperationRow, Region
from moecc.support.text import amount
from moecc.types import Axis, TensorType, is_name

ATTRIBUTE = "mesh"

_PART = re.compile(r"([A-Za-z_]\w*)[:=]([0-9]{1,9})\Z", re.ASCII)

Coordinates = tuple[int, ...]
"""The coordinates of a device: its index on each axis of the mesh."""


@dataclass(frozen=True)
class Mesh:
    """Named axes of devices, outermost first.

    Attributes:
      axes: name and size of each axis.
    """

    axes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        names = self.names
        fits = all(is_name(n) and isinstance(s, int) and s >= 1 for n, s in self.axes)
        if not self.axes or not fits or len(set(names)) != len(names):
            raise InputError(
                "not a mesh", expected="axes with sizes, data:8,model:4", found=str(self)
            )

    def __str__(self) -> str:
        return ",".join(f"{n}:{s}" for n, s in self.axes)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the axes."""
        return tuple(n for n, _ in self.axes)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The sizes of the axes, by name."""
        return dict(self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the axes."""
        return tuple(s for _, s in self.axes)

    @property
    def devices(self) -> int:
        """The number of devices."""
        return prod(self.shape)

    def size(self, axes: Iterable[str]) -> int:
        """Return the number of parts that `axes` together cut something into.

        Raises:
          InputError: the mesh has no such axis.
        """
        product, sizes = 1, self.sizes
        for name in axes:
            if name not in sizes:
                raise InputError(
                    f"the mesh has no axis {name!r}",
                    expected=str(self),
                    hint=nearest(name, sizes),
                )
            product *= sizes[name]
        return product

    def coordinates(self) -> Iterator[Coordinates]:
        """Yield the coordinates of every device, in the order of their numbers."""
        yield from product(*map(range, self.shape))

    def part(self, at: Coordinates, axes: Iterable[str]) -> int:
        """Return which of the parts that `axes` make is that of the device at `at`."""
        index = 0
        for name in axes:
            position = self.names.index(name)
            index = index * self.shape[position] + at[position]
        return index

    def peers(self, at: Coordinates, axes: Iterable[str]) -> list[Coordinates]:
        """Return the devices that differ from `at` along `axes` alone, in the order of parts."""
        axes = tuple(axes)
        places = [self.names.index(a) for a in axes]
        peers = []
        for picked in product(*(range(self.shape[p]) for p in places)):
            peer = list(at)
            for p, i in zip(places, picked, strict=True):
                peer[p] = i
            peers.append(tuple(peer))
        return peers


def parse_mesh(text: str) -> Mesh:
    """Return the mesh that `text`, ``data:8,model:4``, spells.

    Raises:
      InputError: it spells none.
    """
    parts = [_PART.match(p.strip()) for p in text.split(",")]
    if not all(parts):
        raise InputError("not a mesh", expected="axes with sizes, data:8,model:4", found=text)
    return Mesh(tuple((m.group(1), int(m.group(2))) for m in parts if m is not None))


def mesh_of(graph: Region) -> Mesh | None:
    """Return the mesh of `graph`, or None where it has none.

    Raises:
      InputError: its attribute is not a mesh.
    """
    value = graph.attrs.get(ATTRIBUTE)
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise InputError(
            "the attribute mesh is not a mesh", expected='{"data": 8, "model": 4}', found=str(value)
        )
    return Mesh(tuple(value.items()))


def required_mesh(graph: Region) -> Mesh:
    """Return the mesh of `graph`.

    Raises:
      InputError: it has none, or its attribute is not a mesh.
    """
    mesh = mesh_of(graph)
    if mesh is None:
        hint = "annotate-sharding{mesh=data:8 rules=st-moe}"
        raise InputError("the graph has no mesh", hint=hint)
    return mesh


def set_mesh(graph: Region, mesh: Mesh | None) -> None:
    """Give `graph`, and the bodies in it, the mesh, or take it away."""
    bodies = [node.body for node in graph if node.body is not None]
    for each in (graph, *bodies):
        each.attrs.pop(ATTRIBUTE, None)
        if mesh is not None:
            each.attrs[ATTRIBUTE] = dict(mesh.axes)


def sharding_problems(type: TensorType, mesh: Mesh | None) -> Iterator[Problem]:
    """Yield what keeps a value of `type` from lying on `mesh`.

    A symbolic size, and one that an ``assign_slots`` value sets, shows at run time whether it
    divides.
    """
    if not type.is_sharded:
        return
    if mesh is None:
        yield Problem(
            "the type names mesh axes, and the graph has no mesh",
            found=str(type),
            hint='add attr mesh = {"data": 8}, say',
        )
        return
    used = [*(m for a in type.axes for m in a.mesh), *type.unreduced]
    for name in dict.fromkeys(used):
        if name not in mesh.names:
            hint = nearest(name, mesh.names)
            yield Problem(f"the mesh has no axis {name!r}", None, str(mesh), str(type), hint)
        elif used.count(name) > 1:
            yield Problem(f"the mesh axis {name!r} is used twice", None, None, str(type))
    for axis in type.axes:
        if set(axis.mesh) <= set(mesh.names):
            yield from indivisible(axis, mesh)


def indivisible(axis: Axis, mesh: Mesh) -> Iterator[Problem]:
    """Yield the problem of an axis that its mesh axes do not divide: sizes, and what would."""
    parts = mesh.size(axis.mesh)
    if not isinstance(axis.size, int) or axis.size % parts == 0:
        if axis.mesh and not isinstance(axis.size, int | str) and axis.size.kind != "groups":
            yield Problem(f"slots cannot be sharded: {axis.name!r}", found=str(axis))
        return
    sizes = "*".join(f"{n}:{mesh.size((n,))}" for n in axis.mesh)
    yield Problem(
        f"the axis {axis.name!r} does not divide over the mesh",
        expected=f"a multiple of {parts} ({sizes})",
        found=str(axis),
        hint=f"{amount(nearest_divisor(axis.size, parts), 'part')} would, or a size of "
        f"{nearest_multiple(axis.size, parts)}",
    )


def nearest_divisor(size: int, parts: int) -> int:
    """Return the divisor of `size` that is nearest to `parts`, the smaller of two."""
    divisors = [d for d in range(1, min(size, 2 * parts) + 1) if size % d == 0]
    return min(divisors, key=lambda d: abs(d - parts), default=1)


def nearest_multiple(size: int, parts: int) -> int:
    """Return the multiple of `parts`, not 0, that is nearest to `size`, the larger of two."""
    return max(1, (2 * size + parts) // (2 * parts)) * parts


# Sharding propagation: the sharding of an operation's results from that of its operands.
#
# An operation loops over *dimensions*.  Its rule says which dimension each axis of each operand and
# result runs along, which dimensions it sums over, and which must not be sharded.  A dimension has
# the same mesh axes in all operands and results; a sum over a sharded one is *unreduced*.  The
# rule is a field of the operation's row (`moecc.ir.ops.rules` has the rules that rows name); an
# operation without one takes replicated operands only.

Names = Mapping[str, str]
"""Axis → dimension; an axis not named has no influence, and is not sharded in a result."""


@dataclass(frozen=True)
class Space:
    """The dimensions that one application of an operation loops over.

    Attributes:
      operands: for each operand, the dimensions of its axes.
      result: the dimensions of the axes of every result.
      summed: dimensions that it sums over; if one is sharded, the result is unreduced.
      unsharded: dimensions that must not be sharded.
      counts: numbers that the shards of a dimension must divide, and what they count.
      shape_only: whether it reads only the axes of its operands, and no element.
    """

    operands: tuple[Names, ...]
    result: Names
    summed: frozenset[str] = frozenset()
    unsharded: frozenset[str] = frozenset()
    counts: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    shape_only: bool = False


Rule = Callable[[OperationRow, Sequence[Operand], Attrs], Space]


class ShardedEntry(OperationRow, Protocol):
    """A row of the operation table, with its sharding rule."""

    @property
    def sharding(self) -> Rule | None:
        """The rule, or None if all operands must be replicated."""
        ...


def space_of(entry: ShardedEntry, operands: Sequence[Operand], attrs: Attrs) -> Space:
    """Return the dimensions of an operation; without a rule none may be sharded."""
    if entry.sharding is not None:
        return entry.sharding(entry, operands, attrs)
    names = tuple({n: f"{i}.{n}" for n in v.type.names} for i, v in enumerate(operands))
    return Space(names, {}, unsharded=frozenset(d for n in names for d in n.values()))


class NamedType(NamedTuple):
    """An operand by its name, for messages, and its type."""

    name: str
    type: TensorType


def sharded_results(
    entry: OperationRow,
    space: Space,
    operands: Sequence[NamedType],
    types: Sequence[TensorType],
    mesh: Mesh | None,
) -> tuple[TensorType, ...]:
    """Return the result `types` with the sharding that follows from the operands.

    Args:
      entry: the operation.
      space: the dimensions of this application of it.
      operands: names and types of the operands.
      types: the result types, whose sharding is ignored.
      mesh: the mesh, or None to skip the check that counts divide.

    Raises:
      InputError: the operation does not accept an operand's sharding; names operand and axis.
    """
    if not any(o.type.is_sharded for o in operands):
        return tuple(t.bare for t in types)
    shardings = _dimensions(entry, operands, space)
    _check_once(shardings)
    if mesh is not None:
        _check_counts(mesh, space, shardings)
    left = dict.fromkeys(m for d in sorted(space.summed) for m in shardings.get(d, _WHOLE).mesh)
    left |= dict.fromkeys(_unreduced(entry, operands, shardings))
    return tuple(_sharded(t, space.result, shardings, tuple(left)) for t in types)


def propagate_sharding(
    entry: ShardedEntry, operands: Sequence[Operand], attrs: Attrs, types: Sequence[TensorType]
) -> tuple[TensorType, ...]:
    """Return the result `types` with the sharding that follows from the values `operands`.

    Raises:
      InputError: as `sharded_results` does.
    """
    space = space_of(entry, operands, attrs)
    mesh = mesh_of(operands[0].graph) if space.counts else None
    named = [NamedType(v.name, v.type) for v in operands]
    return sharded_results(entry, space, named, types, mesh)


class _Sharding(NamedTuple):
    """The mesh axes of a dimension, and the operand and axis that determine them."""

    mesh: tuple[str, ...]
    value: str = ""
    axis: str = ""


_WHOLE = _Sharding(())


def _dimensions(
    entry: OperationRow, operands: Sequence[NamedType], space: Space
) -> dict[str, _Sharding]:
    shardings: dict[str, _Sharding] = {}
    for value, names in zip(operands, space.operands, strict=True):
        for axis in value.type.axes:
            dimension = names.get(axis.name)
            if dimension is None:
                continue
            if axis.mesh and dimension in space.unsharded:
                raise InputError(
                    f"{entry.name} does not accept a sharded axis {axis.name!r} of %{value.name}",
                    expected=axis.name,
                    found=spelled(axis),
                    hint="all_gather it first, or let annotate-sharding and lower-collectives",
                )
            first = shardings.setdefault(dimension, _Sharding(axis.mesh, value.name, axis.name))
            if first.mesh != axis.mesh:
                raise InputError(
                    f"the axis {axis.name!r} of %{value.name} is sharded unlike that of "
                    f"%{first.value}",
                    expected=spelled(Axis(axis.name, axis.size, first.mesh)),
                    found=spelled(axis),
                    hint="shard or gather one of them",
                )
    return shardings


def spelled(axis: Axis) -> str:
    """Return an axis with its mesh axes, without its size: ``batch@data``."""
    return axis.name + ("@" + "*".join(axis.mesh) if axis.mesh else "")


def _check_once(shardings: Mapping[str, _Sharding]) -> None:
    used: dict[str, _Sharding] = {}
    for where in shardings.values():
        for name in where.mesh:
            first = used.setdefault(name, where)
            if first is not where:
                raise InputError(
                    f"two axes are sharded over the mesh axis {name!r}",
                    expected="each mesh axis at most once",
                    found=f"{first.axis} of %{first.value}, {where.axis} of %{where.value}",
                    hint="gather one of them",
                )


def _check_counts(mesh: Mesh, space: Space, shardings: Mapping[str, _Sharding]) -> None:
    for dimension, (noun, count) in space.counts.items():
        where = shardings.get(dimension, _WHOLE)
        parts = mesh.size(where.mesh)
        if count % parts:
            raise InputError(
                f"{noun} do not divide over the mesh as {where.axis!r} of %{where.value} does",
                expected=f"a multiple of {parts}",
                found=str(count),
                hint=f"{noun}={nearest_multiple(count, parts)} would, and counts capacities in "
                "smaller groups; or replicate the tokens",
            )


def _unreduced(
    entry: OperationRow, operands: Sequence[NamedType], shardings: Mapping[str, _Sharding]
) -> Iterator[str]:
    """Yield the mesh axes over which operands, and so the result, are unreduced sums."""
    if not any(v.type.unreduced for v in operands):
        return
    split = {m for where in shardings.values() for m in where.mesh}
    sums = [set(v.type.unreduced) for v in operands]
    for number, value in enumerate(operands):
        others = set().union(*(s for i, s in enumerate(sums) if i != number))
        for name in value.type.unreduced:
            together = entry.jointly and all(name in sums[i] for i in entry.linear)
            alone = not entry.jointly and name not in others
            if number not in entry.linear or name in split or not (together or alone):
                raise InputError(
                    f"{entry.name} does not accept %{value.name}, an unreduced sum",
                    expected=f"a value reduced over {name!r}",
                    found=str(value.type),
                    hint=f"all_reduce it over {name!r} first",
                )
            yield name


def _sharded(
    type: TensorType, names: Names, shardings: Mapping[str, _Sharding], unreduced: tuple[str, ...]
) -> TensorType:
    mesh_axes = [shardings.get(names.get(name, ""), _WHOLE).mesh for name in type.names]
    return type.sharded(tuple(mesh_axes), unreduced)
