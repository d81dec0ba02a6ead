"""What a bisection finds."""

from __future__ import annotations

from dataclasses import dataclass

from moecc.pipeline.passes import Pass
from moecc.pipeline.text import format_pass
from moecc.tasks.failures import Failure
from moecc.tasks.value_gaps import Gap

PASS = "pass"
LOWERING = "lowering"
SIMPLIFIER = "simplifier"
WRITER = "evaluator or writer"
STEPS = (PASS, LOWERING, SIMPLIFIER, WRITER)
"""What can be wrong: a pass; how XLA computes an operation; a rule by which weight expressions are
simplified; how they are evaluated and written."""


@dataclass(frozen=True)
class Bisection:
    """The result of a bisection.

    Attributes:
      failure: what fails.
      step: what is wrong, one of `STEPS`.
      number: the number of the first pass that is wrong, or after which the failure is first seen,
        from 1; 0 if it is seen before any pass.
      item: that pass.
      rewrite: the first wrong rewrite, pass and rule and what it replaced; empty where none is
        known.
      rewrites: which of the rewrites of the pass that is, from 1, and how many there are.
      gap: the first value that differs, with its node.
    """

    failure: Failure
    step: str = PASS
    number: int = 0
    item: Pass | None = None
    rewrite: str = ""
    rewrites: tuple[int, int] = (0, 0)
    gap: Gap | None = None

    def as_dict(self) -> dict[str, object]:
        """Return it as JSON values."""
        found = self.gap
        return {
            "kind": self.failure.kind,
            "text": self.failure.text,
            "step": self.step,
            "pass": {"number": self.number, "text": format_pass(self.item)} if self.item else None,
            "rewrite": {
                "text": self.rewrite,
                "number": self.rewrites[0],
                "of": self.rewrites[1],
            }
            if self.rewrite
            else None,
            "value": {
                "where": found.place,
                "expected": str(found.expected),
                "found": str(found.found),
            }
            if found
            else None,
        }
