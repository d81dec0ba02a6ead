"""Flow: where the results of an operation lie on a mesh, from where its operands lie.

An operation loops over *dimensions*.  Its rule says which dimension each axis of each operand and
result runs along, which dimensions it sums over, and which it must have whole.  A dimension lies on
the same mesh axes in all that run along it; a sum over one that lies split is *unreduced*.  The
rule is a field of the operation's row (`moecc.ir.table.flows` has those that rows name); an
operation without one takes operands that lie whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from moecc.errors import InputError
from moecc.ir.mesh import Mesh, mesh_of, nearest_multiple
from moecc.ir.operand import Attrs, Entry, Operand
from moecc.types.tensor import Axis, TensorType

Names = Mapping[str, str]
"""Axis → dimension; an axis that is not named has no influence, and in a result lies whole."""


@dataclass(frozen=True)
class Space:
    """The dimensions that one application of an operation loops over.

    Attributes:
      operands: for each operand, the dimensions of its axes.
      result: the dimensions of the axes of every result.
      summed: dimensions that it sums over; they may lie split, and the result is then unreduced.
      whole: dimensions that it must have whole.
      counts: numbers that the parts of a dimension must divide, and what they count.
      shape_only: whether it looks at the axes of its operands, and at no element.
    """

    operands: tuple[Names, ...]
    result: Names
    summed: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()
    counts: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    shape_only: bool = False


Rule = Callable[[Entry, Sequence[Operand], Attrs], Space]


class ShardedEntry(Entry, Protocol):
    """A row of the operation table, with the rule by which it shares a mesh."""

    @property
    def sharding(self) -> Rule | None:
        """The rule, or None where all operands lie whole."""
        ...


def space_of(entry: ShardedEntry, operands: Sequence[Operand], attrs: Attrs) -> Space:
    """Return the dimensions of an operation; all of them whole, where it has no rule."""
    if entry.sharding is not None:
        return entry.sharding(entry, operands, attrs)
    names = tuple({n: f"{i}.{n}" for n in v.type.names} for i, v in enumerate(operands))
    return Space(names, {}, whole=frozenset(d for n in names for d in n.values()))


class Given(NamedTuple):
    """An operand by its name, for messages, and its type."""

    name: str
    type: TensorType


def sharded_results(
    entry: Entry,
    space: Space,
    operands: Sequence[Given],
    types: Sequence[TensorType],
    mesh: Mesh | None,
) -> tuple[TensorType, ...]:
    """Return the result `types` with the sharding that follows from the operands.

    Args:
      entry: the operation.
      space: the dimensions of this application of it.
      operands: names and types of the operands.
      types: of the results, whose sharding does not count.
      mesh: the mesh, or None where nobody asks whether counts divide.

    Raises:
      InputError: an operand lies where the operation cannot take it; it names operand and axis.
    """
    if not any(o.type.is_sharded for o in operands):
        return tuple(t.bare for t in types)
    lies = _dimensions(entry, operands, space)
    _check_once(lies)
    if mesh is not None:
        _check_counts(mesh, space, lies)
    left = dict.fromkeys(m for d in sorted(space.summed) for m in lies.get(d, _WHOLE).mesh)
    left |= dict.fromkeys(_carried(entry, operands, lies))
    return tuple(_placed(t, space.result, lies, tuple(left)) for t in types)


def propagate_sharding(
    entry: ShardedEntry, operands: Sequence[Operand], attrs: Attrs, types: Sequence[TensorType]
) -> tuple[TensorType, ...]:
    """Return the result `types` with the sharding that follows from the values `operands`.

    Raises:
      InputError: as `sharded_results` does.
    """
    space = space_of(entry, operands, attrs)
    mesh = mesh_of(operands[0].graph) if space.counts else None
    given = [Given(v.name, v.type) for v in operands]
    return sharded_results(entry, space, given, types, mesh)


@dataclass(frozen=True, slots=True)
class _Lies:
    """Where a dimension lies, and the operand and axis that say so."""

    mesh: tuple[str, ...]
    value: str = ""
    axis: str = ""


_WHOLE = _Lies(())


def _dimensions(entry: Entry, operands: Sequence[Given], space: Space) -> dict[str, _Lies]:
    lies: dict[str, _Lies] = {}
    for value, names in zip(operands, space.operands, strict=True):
        for axis in value.type.axes:
            dimension = names.get(axis.name)
            if dimension is None:
                continue
            if axis.mesh and dimension in space.whole:
                raise InputError(
                    f"{entry.name} needs the axis {axis.name!r} of %{value.name} whole",
                    expected=axis.name,
                    found=spelled(axis),
                    hint="all_gather it first, or let annotate-sharding and lower-collectives",
                )
            first = lies.setdefault(dimension, _Lies(axis.mesh, value.name, axis.name))
            if first.mesh != axis.mesh:
                raise InputError(
                    f"the axis {axis.name!r} of %{value.name} lies elsewhere than that of "
                    f"%{first.value}",
                    expected=spelled(Axis(axis.name, axis.size, first.mesh)),
                    found=spelled(axis),
                    hint="shard or gather one of them",
                )
    return lies


def spelled(axis: Axis) -> str:
    """Return an axis and where it lies, without its size: ``batch@data``."""
    return axis.name + ("@" + "*".join(axis.mesh) if axis.mesh else "")


def _check_once(lies: Mapping[str, _Lies]) -> None:
    used: dict[str, _Lies] = {}
    for where in lies.values():
        for name in where.mesh:
            other = used.setdefault(name, where)
            if other is not where:
                raise InputError(
                    f"two axes lie on the mesh axis {name!r}",
                    expected="each mesh axis at most once",
                    found=f"{other.axis} of %{other.value}, {where.axis} of %{where.value}",
                    hint="gather one of them",
                )


def _check_counts(mesh: Mesh, space: Space, lies: Mapping[str, _Lies]) -> None:
    for dimension, (what, count) in space.counts.items():
        where = lies.get(dimension, _WHOLE)
        parts = mesh.size(where.mesh)
        if count % parts:
            raise InputError(
                f"{what} do not divide over the mesh as {where.axis!r} of %{where.value} does",
                expected=f"a multiple of {parts}",
                found=str(count),
                hint=f"{what}={nearest_multiple(count, parts)} would, and counts capacities in "
                "smaller groups; or lay the tokens whole",
            )


def _carried(entry: Entry, operands: Sequence[Given], lies: Mapping[str, _Lies]) -> Iterator[str]:
    """Yield the mesh axes over which operands, and so the result, are sums not carried out."""
    if not any(v.type.unreduced for v in operands):
        return
    split = {m for where in lies.values() for m in where.mesh}
    sums = [set(v.type.unreduced) for v in operands]
    for number, value in enumerate(operands):
        others = set().union(*(s for i, s in enumerate(sums) if i != number))
        for name in value.type.unreduced:
            together = entry.jointly and all(name in sums[i] for i in entry.linear)
            alone = not entry.jointly and name not in others
            if number not in entry.linear or name in split or not (together or alone):
                raise InputError(
                    f"{entry.name} cannot take %{value.name}, a sum not yet carried out",
                    expected=f"a value reduced over {name!r}",
                    found=str(value.type),
                    hint=f"all_reduce it over {name!r} first",
                )
            yield name


def _placed(
    type: TensorType, names: Names, lies: Mapping[str, _Lies], unreduced: tuple[str, ...]
) -> TensorType:
    axes = (Axis(a.name, a.size, lies.get(names.get(a.name, ""), _WHOLE).mesh) for a in type.axes)
    return TensorType(type.dtype, tuple(axes), unreduced)
