"""A law that is never put to the test fails, and says on how many graphs it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import Phase, given, settings

from moecc.rewrite import P, Rule, rewrite
from moecc.rewrite.passes import EXACT, Pass, PassResult
from moecc.testing import graphs, laws, random_graph

_x = P.any("x")

RARE = Rule("rare", P.square(P.neg(P.square(_x))), lambda m, b: b.square(b.square(m.value("x"))))


@dataclass(frozen=True)
class RarePass(Pass):
    """Replaces what random graphs hardly ever have."""

    name: ClassVar[str] = "rare"
    summary: ClassVar[str] = "drop a sign that a square drops, too"
    preserves = EXACT
    salt: int = 0

    def apply(self, graph, ctx):
        return PassResult.of(rewrite(graph, [RARE], origin=self.name))


def test_a_pass_that_never_matches_fails():
    # There is no smaller example of a rule that nothing matches.
    @settings(phases=[Phase.generate])
    @given(graphs())
    def law(graph):
        laws.check_pass(RarePass(), graph)

    with pytest.raises(AssertionError, match=r"(?s)rare matched on 0 of 50 graphs.*like=RULE"):
        law()


@settings(max_examples=60)
@given(graphs(like=RARE))
def test_planted_graphs_are_enough(graph):
    laws.check_pass(RarePass(salt=3), graph, least=0.5)


def test_a_share_can_be_asked_for():
    def check(seed):
        like = [RARE] if seed % 4 == 0 else []
        laws.check_pass(RarePass(salt=5), random_graph(seed, like=like), least=0.5)

    for seed in range(49):
        check(seed)
    with pytest.raises(AssertionError, match=r"of 50 graphs.*\n  expected: at least 50%"):
        check(49)
