"""The pass ``lower-collectives``: collectives in place of every ``reshard``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Value
from moecc.ir.types import TensorType
from moecc.pipeline.passes import EXACT, Context, Pass, PassResult, Remark

NAME = "lower-collectives"

Step = tuple[str, dict[str, Any]]
"""A collective and its attributes."""


@dataclass(frozen=True)
class LowerCollectivesPass(Pass):
    """Make every ``reshard`` the collectives that bring its operand there, and send least.

    A sum is scattered where its result lies split and reduced everywhere otherwise; a mesh axis
    that goes from one axis to another is an ``all_to_all``; what is to lie split is split before
    anything is gathered.

    Before::

        %y1 = reshard %y {to="batch@data"} : f32[batch@data=B, seq=S, embed=16]
        %r1 = reshard %r {to="expert@data"} : f32[group=8, expert@data=8, …]

    After::

        %y1 = all_reduce %y {mesh=model} : f32[batch@data=B, seq=S, embed=16]
        %r1 = all_to_all %r {mesh=data, split=expert, gather=group} : f32[group=8, expert@data=8, …]
    """

    name: ClassVar[str] = NAME
    summary: ClassVar[str] = "make collectives of what is brought elsewhere"
    takes_rolled: ClassVar[bool] = True
    preserves = EXACT

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Replace every ``reshard``."""
        counts: Counter[str] = Counter()
        found = 0
        for node in list(graph.every_node()):
            if node.op.name != "reshard":
                continue
            found += 1
            cause = _cause(node.origin)
            builder = Builder(node.graph, loc=node.loc, origin=f"{NAME}/{cause}", before=node)
            value, target = node.operands[0], node.result.type
            for op, attrs in steps(value.type, target):
                value = _emit(builder, value, op, attrs)
                counts[op] += 1
            node.replace_by(value)
        for op, count in sorted(counts.items()):
            ctx.remark(Remark("", f"{count} × {op}"))
        return PassResult(found > 0, found, dict(sorted(counts.items())))


def _cause(origin: str) -> str:
    return origin.rpartition("/")[2] or "reshard"


def _emit(builder: Builder, value: Value, op: str, attrs: dict[str, Any]) -> Value:
    made: Value = builder.node(op, value, names=(value.name,), **attrs).result
    return made


def steps(source: TensorType, target: TensorType) -> Iterator[Step]:
    """Yield the collectives that bring a value of type `source` to where `target` lies.

    Both types are alike but for where they lie; `target` is no sum left to be carried out.
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


def _same_axis(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return "split" not in a and a.get("axis") == b.get("axis")
