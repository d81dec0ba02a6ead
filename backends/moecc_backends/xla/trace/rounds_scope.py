"""The name of a loop over rounds, by which its number of turns is found in a compiled program."""

from __future__ import annotations

import re

_SCOPE = "rounds_at_most_{}"
_FOUND = re.compile(_SCOPE.format(r"(\d+)"))


def rounds_scope(most: int) -> str:
    """Return the name of a loop over rounds of an exchange: one if balanced, at most `most`."""
    return _SCOPE.format(most)


def most_rounds(source: str) -> int | None:
    """Return how many turns the loop traced as `source` has at most; None if of no rounds."""
    found = _FOUND.findall(source)
    return int(found[-1]) if found else None
