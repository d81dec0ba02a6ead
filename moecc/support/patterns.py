"""Regular expressions of strangers, matched in time that is linear in the text.

Python's own matcher backtracks, and a pattern such as ``(a+)+b`` takes longer than anyone waits.
Here a part of a pattern maps the set of positions where it may begin to those where it may end, so
that no position is tried twice.  What cannot be matched in this way is no `Pattern`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Set
from dataclasses import dataclass

LONGEST = 1024
"""The most characters of a pattern."""

_DEEPEST = 16
_ATOM = re.compile(
    r"\\[dDwWsS]|\\[^\w\s]|\[\^?(?:[\w.]-[\w.]|[\w.]|\\[dDwWsS.])+\]|[^\\()\[\]{}|*+?^$]", re.ASCII
)

_Step = Callable[[str, Set[int]], Set[int]]
"""From the positions where a part may begin to those where it may end."""


class UnsupportedPattern(ValueError):
    """The pattern is none, or has a construct that is not matched here."""


@dataclass(frozen=True)
class NamePattern:
    """A regular expression without look-around, back-references, counts and lazy repetitions.

    Attributes:
      text: the pattern.
      step: what it matches.
    """

    text: str
    step: _Step

    def matches(self, name: str) -> bool:
        """Return whether the pattern matches `name`, or what follows one of its dots."""
        starts = {0, *(at + 1 for at, character in enumerate(name) if character == ".")}
        return len(name) in self.step(name, starts)


def parse_pattern(text: str) -> NamePattern:
    """Return the pattern that `text` spells.

    Raises:
      UnsupportedPattern: it spells none, is too long, or has another construct.
    """
    if len(text) > LONGEST:
        raise UnsupportedPattern(f"more than {LONGEST:,} characters")
    parser = _PatternParser(text)
    step, _ = parser.alternatives(0)
    if parser.at != len(text):
        raise UnsupportedPattern(f"{text[parser.at]!r} at character {parser.at + 1}")
    return NamePattern(text, step)


class _PatternParser:
    """Reads a pattern from left to right; each method returns a step, and whether it repeats."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def _take(self, token: str) -> bool:
        if not self.text.startswith(token, self.at):
            return False
        self.at += len(token)
        return True

    def alternatives(self, depth: int) -> tuple[_Step, bool]:
        """Read sequences with bars between them."""
        if depth > _DEEPEST:
            raise UnsupportedPattern(f"more than {_DEEPEST} groups inside one another")
        read = [self._sequence(depth)]
        while self._take("|"):
            read.append(self._sequence(depth))
        steps = [step for step, _ in read]
        repeats = any(repeated for _, repeated in read)
        return (steps[0] if len(steps) == 1 else _either(steps)), repeats

    def _sequence(self, depth: int) -> tuple[_Step, bool]:
        steps: list[_Step] = []
        repeats = False
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            step, repeated = self._repeated(depth)
            steps.append(step)
            repeats |= repeated
        return _in_order(steps), repeats

    def _repeated(self, depth: int) -> tuple[_Step, bool]:
        start = self.at
        step, repeats = self._single(depth)
        for mark in "*+?":
            if not self._take(mark):
                continue
            if repeats and mark != "?":
                raise UnsupportedPattern(f"a repetition of a repetition at character {start + 1}")
            if self.text[self.at : self.at + 1] in tuple("*+?{"):
                raise UnsupportedPattern(f"{self.text[self.at]!r} at character {self.at + 1}")
            return _repetition(step, mark), True
        return step, repeats

    def _single(self, depth: int) -> tuple[_Step, bool]:
        if self._take("^"):
            return (lambda name, starts: starts & {0}), False
        if self._take("$"):
            return (lambda name, starts: starts & {len(name)}), False
        if self._take("(?:") or self._take("("):
            read = self.alternatives(depth + 1)
            if not self._take(")"):
                raise UnsupportedPattern("a parenthesis is not closed")
            return read
        atom = _ATOM.match(self.text, self.at)
        if atom is None:
            raise UnsupportedPattern(f"{self.text[self.at]!r} at character {self.at + 1}")
        self.at = atom.end()
        try:
            character = re.compile(atom[0])
        except re.error as error:
            raise UnsupportedPattern(str(error)) from None
        return _one(character), False


def _one(character: re.Pattern[str]) -> _Step:
    def step(name: str, starts: Set[int]) -> Set[int]:
        return {at + 1 for at in starts if character.match(name, at) is not None}

    return step


def _in_order(steps: list[_Step]) -> _Step:
    def step(name: str, starts: Set[int]) -> Set[int]:
        for part in steps:
            if not starts:
                break
            starts = part(name, starts)
        return starts

    return step


def _either(steps: list[_Step]) -> _Step:
    def step(name: str, starts: Set[int]) -> Set[int]:
        return {at for part in steps for at in part(name, starts)}

    return step


def _repetition(inner: _Step, mark: str) -> _Step:
    def step(name: str, starts: Set[int]) -> Set[int]:
        if mark == "?":
            return starts | inner(name, starts)
        reached: set[int] = set() if mark == "+" else set(starts)
        begun: set[int] = set()
        fresh: Set[int] = starts
        while fresh:
            begun |= fresh
            ends = inner(name, fresh)
            reached |= ends
            fresh = ends - begun
        return reached

    return step
