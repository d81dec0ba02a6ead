"""`evidence`: a pass is proved where it can be, and sampled where not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from moecc.ir import Graph
from moecc.ir.text import parse
from moecc.prove import evidence
from moecc.rewrite import P, Rule, rewrite
from moecc.rewrite.passes import Context, Pass, PassResult, Preserves

X, Y = P.any("x"), P.any("y")
DOUBLED = Rule("doubled", P.add(X, X), lambda m, b: b.scale(m.value("x"), by=2.0))
TRIPLED = Rule("tripled", P.add(X, X), lambda m, b: b.scale(m.value("x"), by=3.0))
GATED = Rule("gated", P.silu(X), lambda m, b: b.mul(m.value("x"), b.sigmoid(m.value("x"))))
RULES = {"doubled": DOUBLED, "tripled": TRIPLED, "gated": GATED}

GRAPH = parse(
    """moecc 1
graph g {
  input %x : f32[batch=B, embed=4]
  %d = add %x, %x : f32[batch=B, embed=4]
  %s = silu %d : f32[batch=B, embed=4]
  output y = %s
}
"""
)


@dataclass(frozen=True)
class RulePass(Pass):
    """Applies one of the rules."""

    name: ClassVar[str] = "rule"
    summary: ClassVar[str] = "apply a rule"
    rule: str = "doubled"
    preserves = Preserves("reassociation")

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        return PassResult.of(rewrite(graph, [RULES[self.rule]], origin=self.name))


@pytest.mark.parametrize(("rule", "rests_on"), [("doubled", "proved"), ("gated", "sampled")])
def test_what_a_promise_rests_on(rule: str, rests_on: str) -> None:
    assert evidence(RulePass(rule), GRAPH) == rests_on


def test_a_wrong_pass_fails_on_drawn_data() -> None:
    with pytest.raises(AssertionError, match="promises reassociation"):
        evidence(RulePass("tripled"), GRAPH)
