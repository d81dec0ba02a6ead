"""Sharding propagation: the sharding of an operation's results from that of its operands.

An operation loops over *dimensions*.  Its rule says which dimension each axis of each operand and
result runs along, which dimensions it sums over, and which must not be sharded.  A dimension has
the same mesh axes in all operands and results; a sum over a sharded one is *unreduced*.  The
rule is a field of the operation's row (`moecc.ir.ops.rules` has the rules that rows name); an
operation without one takes replicated operands only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from moecc.errors import InputError
from moecc.ir.mesh import Mesh, mesh_of, nearest_multiple
from moecc.ir.operand import Attrs, Operand, OperationRow
from moecc.types import Axis, TensorType

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
