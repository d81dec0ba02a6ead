"""Tensor types: an element type and an ordered list of named axes.

``bf16[batch=B, seq=S, embed=576]`` has two symbolic sizes and one fixed one; equal variables are
equal sizes.  ``slot=ragged(%p)`` is an axis whose extents the value ``%p`` sets at run time, one
per expert; ``slot=capacity(%p)`` is one whose single extent ``%p`` sets.  ``expert@model`` says
that the axis is sharded over the mesh axis ``model``, and ``unreduced(model)`` that the value is
still a partial sum over it.  The order is the printed order, and for a parameter the order on
disk; no operation's meaning depends on it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from moecc.types.dtypes import DType

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


def is_name(value: object) -> bool:
    """Return whether `value` is a valid name of an axis, a mesh axis or a variable."""
    return isinstance(value, str) and _NAME.match(value) is not None


def is_whole(value: object) -> bool:
    """Return whether `value` is a printable integer: at most eighteen digits."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**18


def is_size(value: object) -> bool:
    """Return whether `value` is a valid fixed or symbolic size."""
    return is_name(value) or (isinstance(value, int) and is_whole(value) and value >= 0)


class Setter(Protocol):
    """The value that sets an extent, which has a name in its graph."""

    @property
    def name(self) -> str:
        """Its name in the graph, without ``%``."""
        ...


@dataclass(frozen=True, slots=True)
class Extent:
    """A size that an ``assign_slots`` value sets at run time.

    Attributes:
      kind: ``ragged`` (one extent per expert and group), ``capacity`` (one for all of them) or
        ``groups`` (the number of token groups).
      value: the ``assign_slots`` result; compared by identity, and up to renaming between graphs.
    """

    kind: str
    value: Setter

    def __str__(self) -> str:
        return f"{self.kind}(%{self.value.name})"


Size = int | str | Extent
"""A number, a variable, or an extent that an ``assign_slots`` value sets."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A named axis: its size and the mesh axes over which it is split, outermost first."""

    name: str
    size: Size
    mesh: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = "@" + "*".join(self.mesh) if self.mesh else ""
        return f"{self.name}{where}={self.size}"

    @property
    def is_ragged(self) -> bool:
        """Whether the axis has one extent per expert."""
        return isinstance(self.size, Extent) and self.size.kind == "ragged"


@dataclass(frozen=True)
class TensorType:
    """The type of a value: ``dtype``, ordered ``axes``, and mesh axes still to be summed over."""

    dtype: DType
    axes: tuple[Axis, ...] = ()
    unreduced: tuple[str, ...] = ()

    @cached_property
    def by_name(self) -> dict[str, Axis]:
        """The axes by their names."""
        return {a.name: a for a in self.axes}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the axes, in order."""
        return tuple(a.name for a in self.axes)

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes of the axes, in order."""
        return tuple(a.size for a in self.axes)

    @cached_property
    def _hash(self) -> int:
        return hash((self.dtype.name, self.axes, self.unreduced))

    def __hash__(self) -> int:
        return self._hash

    def __getitem__(self, name: str) -> Axis:
        return self.by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self.by_name

    def __iter__(self) -> Iterator[Axis]:
        return iter(self.axes)

    def __len__(self) -> int:
        return len(self.axes)

    @cached_property
    def is_sharded(self) -> bool:
        """Whether an axis is sharded over a mesh axis, or the value is an unreduced sum."""
        return bool(self.unreduced) or any(a.mesh for a in self.axes)

    @cached_property
    def meshes(self) -> tuple[tuple[str, ...], ...]:
        """The mesh axes over which each axis is sharded."""
        return tuple(a.mesh for a in self.axes)

    @property
    def bare(self) -> TensorType:
        """This type without any sharding."""
        return self._bare if self.is_sharded else self

    @cached_property
    def _bare(self) -> TensorType:
        return TensorType(self.dtype, tuple(Axis(a.name, a.size) for a in self.axes))

    @cached_property
    def _sharded(self) -> dict[object, TensorType]:
        return {}

    def sharded(
        self, meshes: tuple[tuple[str, ...], ...], unreduced: tuple[str, ...] = ()
    ) -> TensorType:
        """Return this type sharded over other mesh axes.

        Equal answers are one object: a search for a mesh asks thousands of times, and compares.

        Args:
          meshes: for each axis the mesh axes over which it is sharded.
          unreduced: the mesh axes over which the value is an unreduced sum.
        """
        if meshes == self.meshes and unreduced == self.unreduced:
            return self
        bare, key = self.bare, (meshes, unreduced)
        if key not in bare._sharded:
            axes = (Axis(a.name, a.size, m) for a, m in zip(self.axes, meshes, strict=True))
            made = TensorType(self.dtype, tuple(axes), unreduced)
            bare._sharded[key] = made if made.is_sharded else bare
        return bare._sharded[key]

    @property
    def rank(self) -> int:
        """The number of axes."""
        return len(self.axes)

    @property
    def ragged(self) -> Axis | None:
        """The ragged axis, if the type has one."""
        return next((a for a in self.axes if a.is_ragged), None)

    @property
    def extents(self) -> tuple[Extent, ...]:
        """The extents, set by ``assign_slots`` values, that the sizes of this type refer to."""
        return tuple(a.size for a in self.axes if isinstance(a.size, Extent))

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The sizes as numbers.

        Raises:
          ValueError: a size is symbolic.
        """
        if not all(isinstance(s, int) for s in self.sizes):
            raise ValueError(f"{self} has a symbolic size")
        return tuple(s for s in self.sizes if isinstance(s, int))

    @property
    def is_static(self) -> bool:
        """Whether all sizes are numbers."""
        return all(isinstance(s, int) for s in self.sizes)

    def with_axes(self, axes: Iterable[Axis]) -> TensorType:
        """Return this type with other axes."""
        return TensorType(self.dtype, tuple(axes), self.unreduced)

    def with_dtype(self, dtype: DType) -> TensorType:
        """Return this type with another element type."""
        return TensorType(dtype, self.axes, self.unreduced)

    def without(self, *names: str) -> TensorType:
        """Return this type without the axes `names`."""
        return self.with_axes(a for a in self.axes if a.name not in names)

    def __str__(self) -> str:
        text = f"{self.dtype.name}[{', '.join(map(str, self.axes))}]"
        return f"{text} unreduced({', '.join(self.unreduced)})" if self.unreduced else text


def is_printable(type: TensorType) -> bool:
    """Return whether `type` can be printed: valid names and sizes, each name once.

    Results of operations need no such check, because their axes come from operands and attributes.
    """
    mesh = [m for a in type.axes for m in a.mesh]
    return (
        len(set(type.names)) == len(type.names)
        and len(set(mesh)) == len(mesh)
        and all(map(is_name, (*type.names, *mesh, *type.unreduced)))
        and all(isinstance(s, Extent) or is_size(s) for s in type.sizes)
    )


def tensor(dtype: DType, /, **sizes: Size) -> TensorType:
    """Return a type from keyword sizes: ``tensor(F32, batch="B", embed=576)``."""
    return TensorType(dtype, tuple(Axis(n, s) for n, s in sizes.items()))
