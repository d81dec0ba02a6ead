"""Rules: a pattern, a check that may reject with a reason, and the replacement to build.

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
"""The promises of a rewrite, from the strongest to the weakest."""

Build = Callable[[Match, Builder], Value | tuple[Value, ...]]
Check = Callable[[Match], str | None]


def accept(match: Match) -> None:
    """Reject nothing: the check of a rule whose pattern is sufficient."""


@dataclass(frozen=True)
class Rule:
    """A rewrite.

    Attributes:
      name: kebab-case; new nodes have the origin ``pass/name``.
      pattern: the subgraph it applies to; its root is an operation.
      build: returns one replacement for each result of the root, of the same types.
      check: returns why a match is rejected, or None.
      preserves: its promise.
    """

    name: str
    pattern: Pattern
    build: Build
    check: Check = accept
    preserves: PreservesKind = "exact"
