"""A rewrite of your own, right or wrong, with its property test; docs/jobs.md finds the bug.

``moecc opt model.moe --load examples/squares.py -p squares --check`` runs the pass, and ``python -m
pytest examples/squares.py`` its test.
"""

from dataclasses import dataclass
from typing import ClassVar

from hypothesis import given, settings

from moecc.ir import Graph
from moecc.rewrite import P, Rule, rewrite
from moecc.rewrite.passes import EXACT, Context, Pass, PassResult
from moecc.testing import graphs, laws

X = P.any("x")
RULE = Rule("by-hand", P.square(X), lambda m, b: b.mul(m.value("x"), m.value("x")))
WRONG = Rule("twice", P.square(X), lambda m, b: b.add(m.value("x"), m.value("x")))


@dataclass(frozen=True)
class SquaresPass(Pass):
    """Write a square as a product."""

    name: ClassVar[str] = "squares"
    summary: ClassVar[str] = "write a square as a product"
    wrong: bool = False
    preserves = EXACT

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Rewrite every square."""
        return PassResult.of(rewrite(graph, [WRONG if self.wrong else RULE], origin=self.name))


@settings(max_examples=20)
@given(graph=graphs(like=RULE))
def test_squares(graph: Graph) -> None:
    laws.check_pass(SquaresPass(), graph)
