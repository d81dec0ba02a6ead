"""Rules: a pattern, a check that may refuse with a reason, and what is built instead.

A rule keeps no state: whatever `build` needs, it reads from the match, as `check` did.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from moecc.ir.builder import Builder
from moecc.ir.graph import Value
from moecc.rewrite.match import Match
from moecc.rewrite.pattern import Pattern

PreservesKind = Literal["exact", "reassociation", "approximate"]
"""What a rewrite does to the function, from the strongest promise to the weakest."""

Build = Callable[[Match, Builder], Value | tuple[Value, ...]]
Check = Callable[[Match], str | None]


def accept(match: Match) -> None:
    """Refuse nothing: the check of a rule whose pattern says it all."""


@dataclass(frozen=True)
class Rule:
    """A rewrite.

    Attributes:
      name: kebab-case; nodes that it makes have the origin ``pass/name``.
      pattern: what it applies to; begins with an operation.
      build: returns one replacement for each result of the root, of the same types.
      check: returns why a match is refused, or None.
      preserves: what it does to the function.
    """

    name: str
    pattern: Pattern
    build: Build
    check: Check = accept
    preserves: PreservesKind = "exact"
