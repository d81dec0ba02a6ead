"""Names and locations of several layers at once: ``layers.{0..29}.ffn``, ``layers.{3..23..4}.ffn``.

A range includes its first and last number and has an optional step, as in a shell.  The
element of a text at position i has the i-th number of each of its ranges.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})(?:\.\.(\d{1,9}))?\}")
_NUMBER = re.compile(r"(\d+)")


@dataclass(frozen=True)
class Progression:
    """The numbers ``start``, ``start + step`` …, `count` of them."""

    start: int
    step: int
    count: int

    @property
    def last(self) -> int:
        """The last of the numbers."""
        return self.start + self.step * (self.count - 1)

    def __str__(self) -> str:
        step = f"..{self.step}" if self.step != 1 else ""
        return f"{self.start}..{self.last}{step}"


def progression(numbers: Sequence[int]) -> Progression | None:
    """Return `numbers`, two at least, as a rising progression, or None if they are not one."""
    if len(numbers) < 2:
        return None
    numbered = Progression(numbers[0], numbers[1] - numbers[0], len(numbers))
    fits = all(n == numbered.start + i * numbered.step for i, n in enumerate(numbers))
    return numbered if fits and numbered.step > 0 else None


def varying(texts: Sequence[str]) -> tuple[list[str], dict[int, Progression]] | None:
    """Return the pieces of the first of `texts`, and which of them are numbers that progress.

    None if the texts, two at least, differ in anything else, or contain ranges already.
    """
    split = [_NUMBER.split(text) for text in texts]
    if len({len(pieces) for pieces in split}) != 1 or any(map(has_range, texts)):
        return None
    progressions: dict[int, Progression] = {}
    for at, pieces in enumerate(zip(*split, strict=True)):
        if len(set(pieces)) == 1:
            continue
        # The split puts numbers at odd indices; one with leading zeros would not be restored.
        if at % 2 == 0 or any(len(p) > 9 or str(int(p)) != p for p in pieces):
            return None
        numbers = progression([int(p) for p in pieces])
        if numbers is None:
            return None
        progressions[at] = numbers
    return split[0], progressions


def joined(texts: Sequence[str]) -> str | None:
    """Return the text with ranges whose elements are `texts`, or None if there is none."""
    if len(texts) < 2:
        return texts[0] if texts and not has_range(texts[0]) else None
    parts = varying(texts)
    if parts is None:
        return None
    pieces, ranges = parts
    return "".join(f"{{{ranges[i]}}}" if i in ranges else p for i, p in enumerate(pieces))


def element(text: str, at: int) -> str:
    """Return the element of the text with ranges `text` at position `at`."""
    if "{" not in text:
        return text
    return _RANGE.sub(lambda m: str(int(m[1]) + at * int(m[3] or 1)), text)


def has_range(text: str) -> bool:
    """Return whether `text` contains a range."""
    return "{" in text and _RANGE.search(text) is not None


def lengths(text: str) -> set[int]:
    """Return the numbers of elements of the ranges of `text`; 0 for an invalid range."""
    if "{" not in text:
        return set()
    return {_length(int(m[1]), int(m[2]), int(m[3] or 1)) for m in _RANGE.finditer(text)}


def _length(first: int, last: int, step: int) -> int:
    is_valid = step > 0 and last >= first and (last - first) % step == 0
    return (last - first) // step + 1 if is_valid else 0
