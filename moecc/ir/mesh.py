"""Meshes: named axes of devices, and checks that the types of a graph can be sharded over one.

The text of a mesh is ``data:8,model:4``, or with an equals sign; a graph keeps it as its attribute
``mesh``.  Devices are numbered with the last axis fastest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod

from moecc.errors import InputError, Problem, nearest
from moecc.ir.operand import Region
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
