"""The collectives that bring a value from one sharding to another, those that send least."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from moecc.ir.ops import op as entry_of
from moecc.ir.table.collectives import collective_type
from moecc.ir.traits import Collective
from moecc.support.untyped import JsonDict
from moecc.types.tensor import TensorType

Step = tuple[str, JsonDict]
"""A collective and its attributes."""

TRANSPOSED = {
    "all_gather": "reduce_scatter",
    "reduce_scatter": "all_gather",
    "shard": "all_gather",
    "all_to_all": "all_to_all",
    "ragged_all_to_all": "ragged_all_to_all",
}
"""What brings the gradient back, of the same size: a part is gathered, parts of a sum are
scattered.  The gradient of a sum that was carried out is there already."""


class Sent(NamedTuple):
    """A collective that is done to a value.

    Attributes:
      op: its name.
      mesh: the mesh axes that it runs over.
      type: the type of its operand or result, of which a device has more.
      is_local: whether nothing is sent, as where a device takes its shard.
    """

    op: str
    mesh: tuple[str, ...]
    type: TensorType
    is_local: bool


def sent(source: TensorType, steps: Iterable[Step]) -> Iterator[Sent]:
    """Yield what `steps`, one after the other, do to a value of type `source`."""
    type = source
    for op, attrs in steps:
        made = collective_type(op, type, attrs)
        larger = type if _is_larger(type, made) else made
        yield Sent(op, attrs["mesh"], larger, entry_of(op).collective is Collective.LOCAL)
        type = made


def _is_larger(type: TensorType, other: TensorType) -> bool:
    """Whether a device has more of a value of `type`: the fewer mesh axes, the larger the shard."""
    count, less = (sum(len(a.mesh) for a in t.axes) for t in (type, other))
    return count <= less


def steps(source: TensorType, target: TensorType) -> Iterator[Step]:
    """Yield the collectives that bring a value of type `source` to the sharding of `target`.

    Both types are equal but for their sharding; `target` is no unreduced sum.
    """
    now = {a.name: a.mesh for a in source.axes}
    goal = {a.name: a.mesh for a in target.axes}
    yield from _merged(_sums(source, now, goal), _moves(source, now, goal))


def _sums(
    source: TensorType, now: dict[str, tuple[str, ...]], goal: dict[str, tuple[str, ...]]
) -> Iterator[Step]:
    left = list(source.unreduced)
    while left:
        found = next(
            ((n, m) for n in now for m in left if goal[n][: len(now[n]) + 1] == (*now[n], m)), None
        )
        if found is None:
            break
        name, mesh = found
        now[name] = (*now[name], mesh)
        left.remove(mesh)
        yield "reduce_scatter", {"axis": name, "mesh": (mesh,)}
    if left:
        yield "all_reduce", {"mesh": tuple(left)}


def _moves(
    source: TensorType, now: dict[str, tuple[str, ...]], goal: dict[str, tuple[str, ...]]
) -> Iterator[Step]:
    ragged = source.ragged is not None
    while now != goal:
        used = {m for mesh in now.values() for m in mesh}
        move = next(_exchanges(now, goal, ragged), None)
        grow = next(_splits(now, goal, used), None)
        if move is not None:
            gather, split, mesh = move
            now[gather] = now[gather][: -len(mesh)]
            now[split] = (*now[split], *mesh)
            op = "ragged_all_to_all" if ragged else "all_to_all"
            yield op, {"mesh": mesh, "split": split, "gather": gather}
        elif grow is not None:
            name, one = grow
            now[name] = (*now[name], one)
            yield "shard", {"axis": name, "mesh": (one,)}
        else:
            name = next(n for n in now if _excess(now[n], goal[n]))
            one, now[name] = now[name][-1], now[name][:-1]
            yield "all_gather", {"axis": name, "mesh": (one,)}


def _excess(now: tuple[str, ...], goal: tuple[str, ...]) -> bool:
    return now != goal[: len(now)]


def _exchanges(
    now: dict[str, tuple[str, ...]], goal: dict[str, tuple[str, ...]], ragged: bool
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield axes that lose innermost mesh axes which another axis needs next, the most first."""
    for gather, mesh in now.items():
        if not _excess(mesh, goal[gather]):
            continue
        for at in range(len(mesh)):
            moved = mesh[at:]
            if moved == goal[gather][at : at + len(moved)] and mesh[:at] == goal[gather][:at]:
                continue
            for split in now:
                fits = goal[split][: len(now[split]) + len(moved)] == (*now[split], *moved)
                pair = {gather, split} == {"group", "expert"}
                if split != gather and fits and (pair or not ragged):
                    yield gather, split, moved


def _splits(
    now: dict[str, tuple[str, ...]], goal: dict[str, tuple[str, ...]], used: set[str]
) -> Iterator[tuple[str, str]]:
    for name, mesh in now.items():
        if len(mesh) < len(goal[name]) and not _excess(mesh, goal[name]):
            following = goal[name][len(mesh)]
            if following not in used:
                yield name, following


def _merged(*parts: Iterator[Step]) -> Iterator[Step]:
    """Yield steps, neighbours of one kind along one axis as one."""
    last: Step | None = None
    for part in parts:
        for op, attrs in part:
            if last is not None and last[0] == op and _same_axis(last[1], attrs):
                mesh = (
                    (*attrs["mesh"], *last[1]["mesh"])
                    if op == "all_gather"
                    else (*last[1]["mesh"], *attrs["mesh"])
                )
                last = (op, {**attrs, "mesh": mesh})
                continue
            if last is not None:
                yield last
            last = (op, attrs)
    if last is not None:
        yield last


def _same_axis(a: JsonDict, b: JsonDict) -> bool:
    return "split" not in a and a.get("axis") == b.get("axis")
