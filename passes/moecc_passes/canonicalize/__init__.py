"""Canonicalisation: one form for equivalent graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from moecc.ir.graph import Graph
from moecc.pipeline.passes import EXACT, Context, Pass, PassResult, Preserves
from moecc.rewrite import Rule, rewrite
from moecc_passes.canonicalize import axes, constants, elementwise
from moecc_passes.canonicalize.order import order_operands

RULES: tuple[Rule, ...] = (*elementwise.RULES, *axes.RULES, *constants.RULES)


@dataclass(frozen=True)
class CanonicalizePass(Pass):
    """Bring a graph into the canonical form that other passes expect.

    Identities disappear (a scale by 1, a cast to the same type, a whole slice, a broadcast that
    adds no axis), inverses cancel (negations, splits and merges), chains become one operation
    (renames, scales, slices), arithmetic on constants is done, and operands of commutative
    operations are put in an order that depends on how they are computed, not on their names.

    Before::

        %a = neg %x : f32[batch=B, embed=4]
        %b = neg %a : f32[batch=B, embed=4]
        %c = scale %b {by=2.0} : f32[batch=B, embed=4]
        %d = scale %c {by=0.5} : f32[batch=B, embed=4]
        %e = silu %d : f32[batch=B, embed=4]

    After::

        %e = silu %x : f32[batch=B, embed=4]
    """

    name: ClassVar[str] = "canonicalize"
    summary: ClassVar[str] = "bring a graph into the canonical form that other passes expect"
    takes_rolled: ClassVar[bool] = True

    exact: Annotated[bool, "leave out what is equal only in real arithmetic"] = False

    @property
    def preserves(self) -> Preserves:
        """Exact, unless scales are merged, which rounds once instead of twice."""
        if self.exact:
            return EXACT
        return Preserves("reassociation", "a chain of scales is rounded once")

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules that these options enable."""
        return tuple(r for r in RULES if r.preserves == "exact" or not self.exact)

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Apply the rules until none matches, then put operands in order."""
        result = PassResult.of(rewrite(graph, self.rules, origin=self.name))
        ordered = order_operands(graph)
        if all(r.preserves == "exact" or not result.rules[r.name].hits for r in self.rules):
            result.preserves = EXACT
        result.changed |= ordered > 0
        result.matched += ordered
        if ordered:
            result.stats["operands-ordered"] = ordered
        return result
