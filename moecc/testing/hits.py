"""Counting on how many drawn graphs a pass found something to do, so that no law is empty.

Hypothesis tells a test neither when it begins nor when it ends, so graphs are counted by the place
in the code that has them checked, and by the pass.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import CodeType

from moecc.pipeline.passes import Pass

LEAST = 0.01
"""The share of drawn graphs on which a pass must match, unless the test says otherwise."""

ENOUGH = 50
"""After so many graphs the share is looked at; sooner where a test draws fewer, never below 20."""

HINT = (
    "graphs(like=RULE) plants what a rule, a pattern or an example graph describes; least=0 is "
    "for a pass that need not match"
)


@dataclass
class Tally:
    """The graphs that one test has checked one pass on.

    Attributes:
      name: the pass.
      graphs: how many there were.
      matched: on how many of them the pass matched.
      complaint: what is wrong; it stays, since Hypothesis repeats a test that failed.
    """

    name: str
    graphs: int = 0
    matched: int = 0
    complaint: str = ""

    def count(self, matched: bool, least: float) -> str:
        """Count a graph, and return what is wrong if too few have matched by now."""
        if self.complaint:
            return self.complaint
        self.graphs += 1
        self.matched += matched
        if self.graphs >= enough() and self.matched < least * self.graphs:
            self.complaint = (
                f"the pass {self.name} matched on {self.matched} of {self.graphs} graphs, so its "
                f"laws were hardly tested\n  expected: at least {least:.0%}\n  hint: {HINT}"
            )
        return self.complaint


_TALLIES: dict[tuple[CodeType, type[Pass], str], Tally] = {}


def tally(item: Pass, depth: int = 2) -> Tally:
    """Return the tally of a pass in the test that calls.

    Args:
      item: the pass.
      depth: how many frames up the test is, seen from here.
    """
    key = sys._getframe(depth).f_code, type(item), repr(item)
    return _TALLIES.setdefault(key, Tally(item.name))


def enough() -> int:
    """Return after how many graphs the share is looked at: no more than the test draws."""
    hypothesis = sys.modules.get("hypothesis")
    if hypothesis is None or not hypothesis.currently_in_test_context():
        return ENOUGH
    drawn: int = hypothesis.settings.default.max_examples
    return max(20, min(ENOUGH, drawn))
