"""The pass ``lower-collectives``: collectives in place of every ``reshard``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Value
from moecc.ir.traits import CollectiveKind
from moecc.rewrite.passes import EXACT, Context, Pass, PassResult, Remark
from moecc.sharding.collectives import Step, steps

# Collectives as nodes of a graph.


def emit(builder: Builder, value: Value, steps: Iterable[Step]) -> Value:
    """Return what `steps`, one after the other, make of `value`; each has its name."""
    name = value.name
    for op, attrs in steps:
        value = builder.node(op, value, names=(name,), **attrs).result
    return value


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
