"""The passes ``annotate-sharding``, ``lower-collectives`` and ``strip-sharding``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from moecc.errors import InputError, MoeccError, Problem, raise_problems
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.mesh import Mesh, mesh_of, parse_mesh, set_mesh, spelled
from moecc.ir.ops.collectives import format_sharding
from moecc.ir.structure import replace_value
from moecc.ir.traits import CollectiveKind
from moecc.rewrite.passes import EXACT, Context, Pass, PassResult, Remark
from moecc.sharding.assign import Assigner, sites_of
from moecc.sharding.collectives import steps
from moecc.sharding.propagate import Propagation, Ref, Reshard, propagate
from moecc.sharding.rules import LayoutRule, axis_problems, read_layouts, remark_on_groups
from moecc.types import TensorType
from moecc_passes.expert_parallel import (
    REGROUPED,
    cut_groups,
    emit,
    kept_by_cutting,
    restore_groups,
    unchunk,
)

NAME = "annotate-sharding"


@dataclass(frozen=True)
class AnnotateShardingPass(Pass):
    """Shard parameters, inputs and all that follows from them over a mesh of devices.

    A rule names the mesh axes that shard a named axis.  An operation's axes take mesh axes in the
    order of the rules, each mesh axis once; what is sharded otherwise is brought there by a
    ``reshard``, which ``lower-collectives`` makes collectives of, and ``by`` names the rule that
    wanted it.  A sum over a sharded axis is reduced at once.  Axes without a rule are sharded as
    those of the operands are.  Parameters are sharded as their first use wants them, unless a rule
    decides how they are stored.

    Before::

        %h = contract %x, %w {over=embed} : f32[batch=B, seq=S, mlp=64]
        %y = contract %h, %o {over=mlp} : f32[batch=B, seq=S, embed=16]

    After ``annotate-sharding{mesh=data:4,model:2 rules=tensor-parallel}``::

        attr mesh = {"data": 4, "model": 2}
        %h = contract %x, %w {over=embed} : f32[batch@data=B, seq=S, mlp@model=64]
        %y = contract %h, %o {over=mlp} : f32[batch@data=B, seq=S, embed=16] unreduced(model)
        %y1 = reshard %y {to="batch@data"} : f32[batch@data=B, seq=S, embed=16]
    """

    name = NAME
    summary = "shard the graph over a mesh by the rules of a layout"
    must_match = True

    mesh: Annotated[str, "the axes of the mesh and their sizes, data:8,model:4"]
    rules: Annotated[
        tuple[str, ...], "layouts by name, or files of rules; the first takes precedence"
    ]

    # A reshard is the identity; dropless layers may be cut into other groups.
    preserves = REGROUPED

    def validate(self) -> list[Problem]:
        """Return what is wrong with the mesh or the layouts by themselves."""
        problems: list[Problem] = []
        for option, action in (
            ("mesh", lambda: parse_mesh(self.mesh)),
            ("rules", lambda: read_layouts(self.rules)),
        ):
            try:
                action()
            except MoeccError as error:
                problems += [
                    replace(
                        p, where=option, message=f"{p.where}: {p.message}" if p.where else p.message
                    )
                    for p in error.problems
                ]
        return problems

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Lay the graph on the mesh.

        Raises:
          InputError: it is on one already; a rule does not divide, or names an axis of no type; a
            mesh axis is left unused.
        """
        assigner, result = lay(graph, parse_mesh(self.mesh), read_layouts(self.rules))
        _check_used(assigner, self.rules)
        return result


def lay(graph: Graph, mesh: Mesh, rules: Sequence[LayoutRule]) -> tuple[Assigner, PassResult]:
    """Shard `graph` over `mesh` by `rules`, in place.

    Raises:
      InputError: it is on a mesh already; a rule does not divide, or names an axis of no type.
    """
    if mesh_of(graph) is not None:
        raise InputError("the graph is on a mesh already", hint="strip-sharding first")
    results = (value for node in graph for value in node.results)
    values = (*graph.inputs.values(), *graph.params.values(), *results)
    names = {axis.name for value in values for axis in value.type.axes}
    raise_problems(axis_problems(rules, names))
    set_mesh(graph, mesh)
    assigner = Assigner(mesh, rules)
    regrouped = cut_groups(graph, assigner)
    propagation = propagate(sites_of(graph), graph.inputs.values(), graph.params.values(), assigner)
    writer = _Writer(graph, propagation)
    writer.write()
    stats = {"laid": propagation.sharded, "reshards": len(propagation.reshards)}
    remarks = [*regrouped, *writer.remarks()]
    if "group" in names and (text := remark_on_groups(rules, mesh.sizes)):
        remarks.append(Remark("", text))
    preserved = kept_by_cutting(graph)
    return assigner, PassResult(True, propagation.sharded, stats, remarks, preserves=preserved)


def _check_used(assigner: Assigner, names: tuple[str, ...]) -> None:
    """Raise InputError if an axis of the mesh shards nothing: its devices would do the same."""
    for name, size in assigner.mesh.axes:
        if name in assigner.used or size == 1:
            continue
        axes = dict.fromkeys(m for r in assigner.rules for m in r.mesh)
        raise InputError(
            f"nothing is sharded over the mesh axis {name!r}, so its {size} shards would be equal",
            where=f"mesh {assigner.mesh}",
            expected=f"axes that the rules of {', '.join(names)} name: {', '.join(axes)}",
            found=name,
            hint="add a layout that uses it, or leave the axis out",
        )


class _Writer:
    """Writes a propagation into its graph.

    Attributes:
      values: what stands for each reshard.
    """

    def __init__(self, graph: Graph, propagation: Propagation) -> None:
        self.graph = graph
        self.found = propagation
        self.values: dict[Reshard, Value] = {}
        self._caused: Counter[tuple[str, str]] = Counter()
        self._first: dict[tuple[str, str], str] = {}

    def write(self) -> None:
        for value in self.found.visible:
            value.type = self.found.types[value]
        for node in list(self.graph):
            self._node(node)
        for number, value in enumerate(self.graph.terminator.operands):
            self.graph.terminator.set_operand(number, self._value(self.found.visible[value], None))

    def _node(self, node: Node) -> None:
        for number, ref in enumerate(self.found.operands[node]):
            node.set_operand(number, self._value(ref, node))
        for value in node.results:
            self._value(self.found.visible[value], node._next)

    def _value(self, ref: Ref, before: Node | None) -> Value:
        """Return the value that stands for `ref`; a reshard that is new stands before a node."""
        if isinstance(ref, Value):
            return ref
        if ref not in self.values:
            self.values[ref] = self._reshard(ref, before)
        return self.values[ref]

    def _reshard(self, reshard: Reshard, before: Node | None) -> Value:
        value, node, rules = self._value(reshard.operand, before), reshard.node, reshard.rules
        cause = rules[0].axis if rules else "whole"
        builder = Builder(self.graph, loc=node.loc, origin=f"{NAME}/{cause}", before=before)
        to = format_sharding(reshard.target)
        resharded: Value = builder.reshard(value, to=to, name=value.name)
        step = f"{_shown(value.type)} → {_shown(resharded.type)} for {node.op.name}"
        because = f"{rules[0]} ({rules[0].source})" if rules else "no rule lays them elsewhere"
        self._caused[step, because] += 1
        self._first.setdefault((step, because), node.loc)
        return resharded

    def remarks(self) -> list[Remark]:
        """Return what was resharded and why, equal remarks once."""
        return [
            Remark(self._first[key], f"{count} × {key[0]}, because of {key[1]}")
            for key, count in self._caused.items()
        ]


def _shown(type: TensorType) -> str:
    text = f"[{', '.join(map(spelled, type.axes))}]"
    return f"{text} unreduced({', '.join(type.unreduced)})" if type.unreduced else text


# The pass ``strip-sharding``: the graph as it was before it was sharded.

REPEATING = "expert-parallel/"
"""The origin of routing that was done again on gathered tokens."""


@dataclass(frozen=True)
class StripShardingPass(Pass):
    """Take the mesh away, and every collective that is the identity on the global value.

    Before::

        attr mesh = {"data": 4}
        %g = all_gather %w {axis=embed, mesh=data} : f32[mlp=64, embed=16]
        %h = contract %x, %g {over=embed} : f32[batch@data=B, seq=S, mlp=64]

    After::

        %h = contract %x, %w {over=embed} : f32[batch=B, seq=S, mlp=64]
    """

    name = "strip-sharding"
    summary = "remove the mesh and its collectives"
    takes_rolled = True
    # A reshard is the identity; dropless layers may be cut into other groups.
    preserves = REGROUPED

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Erase the collectives, and make every type one of global values alone."""
        erased = 0
        for node in list(graph.every_node()):
            if node.op.collective is not None:
                node.replace_by(node.operands[0])
                erased += 1
        changed = mesh_of(graph) is not None or erased > 0
        regrouped = restore_groups(graph)
        _take_away(graph)
        again = _merge_repeated(graph)
        joined = unchunk(graph)
        stats = {"collectives": erased, "repeated": again, "unchunked": joined}
        preserved = REGROUPED if regrouped or joined else EXACT
        return PassResult(changed, erased, stats, preserves=preserved)


def _take_away(graph: Graph) -> None:
    """Take the mesh away from `graph` and its bodies, and from all types."""
    set_mesh(graph, None)
    for value in (*graph.inputs.values(), *graph.params.values()):
        value.type = value.type.bare
    for node in graph:
        if node.body is not None:
            _take_away(node.body)
        types = node.op.result_types(node.operands, node.attrs)
        for value, type in zip(node.results, types, strict=True):
            value.type = type


def _merge_repeated(graph: Graph) -> int:
    """Merge what ``expert-parallel`` did again with what it repeats; return how often."""
    seen: dict[object, Node] = {}
    merged = 0
    for node in list(graph):
        key = (node.op.name, *node.operands, *sorted(node.attrs.items()))
        first = seen.setdefault(key, node)
        if first is not node and node.origin.startswith(REPEATING):
            for value, repeated in zip(node.results, first.results, strict=True):
                replace_value(value, repeated)
            node.erase()
            merged += 1
    return merged


NAME = "lower-collectives"


@dataclass(frozen=True)
class LowerCollectivesPass(Pass):
    """Make every ``reshard`` the collectives that bring its operand there, and send least.

    A sum is scattered where its result is sharded and reduced everywhere otherwise; a mesh axis
    that goes from one axis to another is an ``all_to_all``; what is to be sharded is split before
    anything is gathered.

    Before::

        %y1 = reshard %y {to="batch@data"} : f32[batch@data=B, seq=S, embed=16]
        %r1 = reshard %r {to="expert@data"} : f32[group=8, expert@data=8, …]

    After::

        %y1 = all_reduce %y {mesh=model} : f32[batch@data=B, seq=S, embed=16]
        %r1 = all_to_all %r {mesh=data, split=expert, gather=group} : f32[group=8, expert@data=8, …]
    """

    name = NAME
    summary = "replace reshards by collectives"
    takes_rolled = True
    preserves = EXACT

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Replace every ``reshard``."""
        counts: Counter[str] = Counter()
        reshards = 0
        for node in list(graph.every_node()):
            if node.op.collective is not CollectiveKind.ANY:
                continue
            reshards += 1
            cause = node.origin.rpartition("/")[2] or "reshard"
            builder = Builder(node.graph, loc=node.loc, origin=f"{NAME}/{cause}", before=node)
            value, target = node.operands[0], node.result.type
            chosen = list(steps(value.type, target))
            counts.update(op for op, _ in chosen)
            node.replace_by(emit(builder, value, chosen))
        for op, count in sorted(counts.items()):
            ctx.remark(Remark("", f"{count} × {op}"))
        return PassResult(reshards > 0, reshards, dict(sorted(counts.items())))
