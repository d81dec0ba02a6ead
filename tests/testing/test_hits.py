"""A law that is never put to the test fails, and says on how many graphs it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import Phase, given, settings

from moecc.rewrite import P, Rule, rewrite
from moecc.rewrite.passes import EXACT, Pass, PassResult, Preserves
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


TWICE = P.scale(P.scale(_x, by=P.attr("a")).only_used_here(), by=P.attr("b"))


def folded(match, b, largest):
    """Return one scale for two, a wrong one where an axis has more than `largest` places."""
    x, factor = match.value("x"), match.attr("a") * match.attr("b")
    is_long = any(isinstance(size, int) and size > largest for size in x.type.sizes)
    return b.scale(x, by=factor * (2 if is_long else 1))


@dataclass(frozen=True)
class FoldPass(Pass):
    """Makes two scales one, and is wrong of long axes."""

    name: ClassVar[str] = "fold"
    summary: ClassVar[str] = "make two scales one, but of long axes"
    preserves = Preserves("reassociation")
    largest: int = 16

    def apply(self, graph, ctx):
        rule = Rule("fold", TWICE, lambda m, b: folded(m, b, self.largest))
        return PassResult.of(rewrite(graph, [rule], origin=self.name))


@pytest.mark.parametrize(("largest", "is_found"), [(16, True), (31, True), (1000, False)])
def test_what_is_wrong_of_long_axes_alone_is_found(largest, is_found):
    # As many as Hypothesis draws where a test says nothing else.
    @settings(max_examples=100, phases=[Phase.generate], derandomize=True, database=None)
    @given(graphs(like=TWICE))
    def law(graph):
        laws.check_pass(FoldPass(largest), graph)

    if not is_found:
        law()
        return
    with pytest.raises(AssertionError, match="the pass promises reassociation"):
        law()
