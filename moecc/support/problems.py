"""Collect the problems of an input, so that all are reported, in bounded length."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from moecc.errors import InputError, MoeccError, Problem, printable

SHOWN_PROBLEMS = 200


class Problems:
    """A list of problems that is raised once; beyond a limit the rest is only counted.

    As a context, ``with problems:``, it records the problems of an InputError in place of raising
    it.
    """

    def __init__(self, limit: int = SHOWN_PROBLEMS) -> None:
        self._limit = limit
        self._shown: list[Problem] = []
        self._hidden = 0

    def __bool__(self) -> bool:
        return bool(self._shown)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, traceback: object) -> bool:
        if not isinstance(error, InputError):
            return False
        self.extend(error.problems)
        return True

    def add(
        self,
        message: str,
        *,
        where: str | Path | None = None,
        expected: str | None = None,
        found: str | None = None,
        hint: str | None = None,
    ) -> None:
        """Record one problem."""
        at = None if where is None else str(where)
        self.extend((Problem(message, at, expected, found, hint),))

    def extend(self, problems: Iterable[Problem]) -> None:
        """Record several problems."""
        for problem in problems:
            if len(self._shown) < self._limit:
                self._shown.append(problem)
            else:
                self._hidden += 1

    def listed(self) -> list[Problem]:
        """Return the recorded problems, with a last line that counts the omitted ones."""
        if not self._hidden:
            return list(self._shown)
        return [*self._shown, Problem(f"and {self._hidden:,} more problems like these")]

    def raise_if_any(self, error: type[MoeccError] = InputError) -> None:
        """Raise `error` with all recorded problems, if there are any."""
        if self._shown:
            raise error(self.listed())


def describe(value: object) -> str:
    """Describe an untrusted JSON value in a few words, whatever its size or depth."""
    if isinstance(value, dict):
        return f"an object with {len(value):,} keys"
    if isinstance(value, list):
        return f"a list of {len(value):,} values"
    if isinstance(value, str):
        return f'"{_clipped(value, 80)}"'
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return printable(str(value), 40)


def quoted(name: str) -> str:
    """Return an untrusted name in quotes, safe for a terminal."""
    return f"'{_clipped(name, 160)}'"


def _clipped(text: str, limit: int) -> str:
    """Escape the beginning of an untrusted text, truncated first, because it may be megabytes."""
    shown = printable(text[:limit], limit * 10)
    return shown if len(text) <= limit else f"{shown}… ({len(text):,} characters)"
