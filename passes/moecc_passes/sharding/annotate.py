"""The pass ``annotate-sharding``: lay a graph on a mesh by the rules of a layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from moecc.errors import InputError, MoeccError, Problem
from moecc.ir.builder import Builder
from moecc.ir.flow import spelled
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.mesh import Mesh, mesh_of, parse_mesh, set_mesh
from moecc.ir.table.collectives import format_sharding
from moecc.ir.table.slots import experts_of
from moecc.ir.verify import where
from moecc.pipeline.passes import EXACT, Context, Pass, PassResult, Preserves, Remark
from moecc.sharding.assign import Assigner, Assignment, cuts_of
from moecc.sharding.rules import LayoutRule, read_layouts
from moecc.types.tensor import Axis, TensorType
from moecc_passes.sharding.groups import REGROUPED, cut_groups

NAME = "annotate-sharding"


@dataclass(frozen=True)
class AnnotateShardingPass(Pass):
    """Lay parameters, inputs and all that follows from them on a mesh of devices.

    A rule says on which mesh axes a named axis lies.  An operation's axes take mesh axes in the
    order of the rules, each mesh axis once; what lies elsewhere is brought there by a ``reshard``,
    which ``lower-collectives`` makes collectives of, and ``by`` says which rule wanted it.  A sum
    over an axis that lies split is carried out at once.  Axes without a rule lie as the operands
    do.  Parameters lie as their first use wants them, unless a rule says how they are stored.

    Before::

        %h = contract %x, %w {over=embed} : f32[batch=B, seq=S, mlp=64]
        %y = contract %h, %o {over=mlp} : f32[batch=B, seq=S, embed=16]

    After ``annotate-sharding{mesh=data:4,model:2 rules=tensor-parallel}``::

        attr mesh = {"data": 4, "model": 2}
        %h = contract %x, %w {over=embed} : f32[batch@data=B, seq=S, mlp@model=64]
        %y = contract %h, %o {over=mlp} : f32[batch@data=B, seq=S, embed=16] unreduced(model)
        %y1 = reshard %y {to="batch@data"} : f32[batch@data=B, seq=S, embed=16]
    """

    name: ClassVar[str] = NAME
    summary: ClassVar[str] = "lay the graph on a mesh by the rules of a layout"
    must_match: ClassVar[bool] = True

    mesh: Annotated[str, "the axes of the mesh and their sizes, data:8,model:4"]
    rules: Annotated[tuple[str, ...], "layouts by name, or files of rules; the first counts most"]

    @property
    def preserves(self) -> Preserves:
        """A ``reshard`` is the identity; dropless layers may be cut into other groups."""
        return REGROUPED

    def validate(self) -> list[Problem]:
        """Return what is wrong with the mesh or the layouts by themselves."""
        found: list[Problem] = []
        for option, action in (
            ("mesh", lambda: parse_mesh(self.mesh)),
            ("rules", lambda: read_layouts(self.rules)),
        ):
            try:
                action()
            except MoeccError as error:
                found += [replace(p, where=option) for p in error.problems]
        return found

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Lay the graph on the mesh.

        Raises:
          InputError: it lies on one already; a rule does not divide; a mesh axis is left unused.
        """
        assigner, result = lay(graph, parse_mesh(self.mesh), read_layouts(self.rules))
        _check_used(assigner, self.rules)
        return result


def lay(graph: Graph, mesh: Mesh, rules: Sequence[LayoutRule]) -> tuple[Assigner, PassResult]:
    """Lay `graph` on `mesh` by `rules`, in place.

    Raises:
      InputError: it lies on a mesh already, or a rule does not divide.
    """
    if mesh_of(graph) is not None:
        raise InputError("the graph lies on a mesh already", hint="strip-sharding first")
    set_mesh(graph, mesh)
    assigner = Assigner(mesh, rules, cuts_of(graph))
    told = cut_groups(graph, assigner)
    annotator = _Annotator(graph, assigner)
    annotator.run()
    stats = {"laid": annotator.laid, "reshards": annotator.count}
    remarks = [*told, *annotator.remarks()]
    kept = REGROUPED if told else EXACT
    return assigner, PassResult(True, annotator.laid, stats, remarks, preserves=kept)


def _check_used(assigner: Assigner, names: tuple[str, ...]) -> None:
    """Raise InputError if nothing lies on an axis of the mesh: its devices would do the same."""
    for name, size in assigner.mesh.axes:
        if name in assigner.used or size == 1:
            continue
        known = dict.fromkeys(m for r in assigner.rules for m in r.mesh)
        raise InputError(
            f"nothing lies on the mesh axis {name!r}, so its {size} parts would do the same",
            where=f"mesh {assigner.mesh}",
            expected=f"axes that the rules of {', '.join(names)} name: {', '.join(known)}",
            found=name,
            hint="add a layout that uses it, or leave the axis out",
        )


class _Annotator:
    """The state of one application.

    Attributes:
      laid: how many values lie split.
      count: how many reshards were put in.
    """

    def __init__(self, graph: Graph, assigner: Assigner) -> None:
        self.graph = graph
        self.assigner = assigner
        self.known: set[Value] = set()
        self.made: dict[tuple[Value, str, str], Value] = {}
        self.laid = 0
        self.count = 0
        self._caused: Counter[tuple[str, str]] = Counter()
        self._first: dict[tuple[str, str], str] = {}

    def run(self) -> None:
        for value in self.graph.inputs.values():
            self.lay(value, self.assigner.lone(value.type))
        for node in list(self.graph):
            try:
                self.node(node)
            except InputError as error:
                raise InputError(
                    replace(p, where=p.where or where(node)) for p in error.problems
                ) from None
        for value in self.graph.params.values():
            if value not in self.known:
                self.lay(value, self.assigner.stored(self.assigner.lone(value.type)))

    def lay(self, value: Value, type: TensorType) -> None:
        value.type = type
        self.known.add(value)
        self.laid += type.is_sharded

    def node(self, node: Node) -> None:
        if node.op.name in ("dispatch", "combine"):
            # Slots and the experts that they were given for belong together.
            node.set_operand(1, experts_of(node.operands[2]))
        assignment = self.assigner.node(node, [v in self.known for v in node.operands])
        for number, value in enumerate(node.operands):
            if value not in self.known:
                wanted = assignment.wanted(number, value.type)
                self.lay(value, self.assigner.stored(wanted))
        for number, value in enumerate(node.operands):
            wanted = assignment.wanted(number, value.type)
            if wanted != value.type:
                rules = assignment.rules(number, value.type) or self._rules_of(value, wanted)
                node.set_operand(number, self.reshard(value, wanted, node, rules))
        types = node.op.result_types(node.operands, node.attrs)
        for value, type in zip(node.results, types, strict=True):
            self.lay(value, type)
        for value in node.results:
            if value.type.unreduced:
                self.reduce(value, node, assignment)

    def _rules_of(self, value: Value, wanted: TensorType) -> list[LayoutRule]:
        """Return the rules behind where `value` lies now, and shall not."""
        pairs = zip(value.type, wanted, strict=True)
        axes = {a.name for a, b in pairs if a.mesh != b.mesh}
        return [r for r in self.assigner.rules if r.axis in axes]

    def reduce(self, value: Value, node: Node, assignment: Assignment) -> None:
        """Carry out the sum `value`, so that it lies where the rules want it."""
        wanted = self.assigner.lone(TensorType(value.type.dtype, value.type.axes).bare)
        # What no rule lays stays where it is.
        taken = {m for a in wanted.axes for m in a.mesh}
        axes = [
            a if a.mesh or taken & set(old.mesh) else Axis(a.name, a.size, old.mesh)
            for a, old in zip(wanted.axes, value.type.axes, strict=True)
        ]
        users = list(value.users)
        summed = [assignment.dimensions[d].rules for d in sorted(assignment.space.summed)]
        rules = [r for rs in summed for r in rs]
        wanted = TensorType(value.type.dtype, tuple(axes))
        made = self.reshard(value, wanted, node, rules, before=node._next)
        for user in users:
            for number, operand in enumerate(user.operands):
                if operand is value:
                    user.set_operand(number, made)

    def reshard(
        self,
        value: Value,
        wanted: TensorType,
        node: Node,
        rules: list[LayoutRule],
        before: Node | None = None,
    ) -> Value:
        """Return `value`, lying as `wanted`; a parameter is brought anew at every place.

        Args:
          value: what lies elsewhere.
          wanted: its type as it shall lie.
          node: the operation that makes or uses it.
          rules: what wants it so.
          before: the node to stand in front of, if not `node`.
        """
        to, loc = format_sharding(wanted), node.loc
        key = (value, to, loc if value.is_param else "")
        if key in self.made:
            return self.made[key]
        cause = rules[0].axis if rules else "whole"
        builder = Builder(self.graph, loc=loc, origin=f"{NAME}/{cause}", before=before or node)
        made = builder.reshard(value, to=to, name=value.name)
        self.made[key] = made
        self.known.add(made)
        self.count += 1
        step = f"{_shown(value.type)} → {_shown(made.type)} for {node.op.name}"
        because = f"{rules[0]} ({rules[0].source})" if rules else "no rule lays them elsewhere"
        self._caused[step, because] += 1
        self._first.setdefault((step, because), loc)
        return made

    def remarks(self) -> list[Remark]:
        """Return what was brought elsewhere and why, what is alike told once."""
        return [
            Remark(self._first[key], f"{count} × {key[0]}, because of {key[1]}")
            for key, count in self._caused.items()
        ]


def _shown(type: TensorType) -> str:
    text = f"[{', '.join(map(spelled, type.axes))}]"
    return f"{text} unreduced({', '.join(type.unreduced)})" if type.unreduced else text
