"""Errors that moecc reports, and their exit codes.

An error is a list of problems, because all problems of an input are reported together: they
are collected first (`Problems`), then raised once.  The class states whose fault it is, and with
that the exit code of the command line.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import ClassVar

ALIASES: dict[str, str] = {}
"""Addresses that messages show in place of the local folders that mirror them."""


def shown(text: object) -> str:
    """Return a text, or a path, with addresses in place of the folders that mirror them."""
    text = str(text)
    for folder, address in ALIASES.items():
        text = text.replace(folder, address)
    return text


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem: a message, where, what was expected, what was found, a way out."""

    message: str
    where: str | None = None
    expected: str | None = None
    found: str | None = None
    hint: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self) if ALIASES else ():
            text = getattr(self, field.name)
            if isinstance(text, str):
                object.__setattr__(self, field.name, shown(text))

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.message}" if self.where else self.message]
        for label, text in (
            ("expected", self.expected),
            ("found", self.found),
            ("hint", self.hint),
        ):
            if text is not None:
                lines.append(f"  {label}: {text}")
        return "\n".join(lines)


class MoeccError(Exception):
    """Base of every error that a user can cause; carries one or more problems."""

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        problems: str | Iterable[Problem],
        *,
        where: str | Path | None = None,
        expected: str | None = None,
        found: str | None = None,
        hint: str | None = None,
    ) -> None:
        if isinstance(problems, str):
            at = None if where is None else str(where)
            self.problems: tuple[Problem, ...] = (Problem(problems, at, expected, found, hint),)
        else:
            self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


class InputError(MoeccError):
    """The input is invalid: a checkpoint, a config, a graph, a target that cannot express it."""

    exit_code = 1


class OwnOperationError(InputError):
    """An operation of the user's own fails, or has not a trait that it declares."""


class UnmatchedError(InputError):
    """A pass matches nothing, or not all that it names: near misses may say why."""


class UnknownName(InputError, KeyError):
    """A mapping has no such name: a KeyError to Python, with a problem to read."""

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


class UsageError(MoeccError):
    """The request is invalid: an unknown pass, option, type or machine; top-k above experts."""

    exit_code = 2


class CheckError(MoeccError):
    """A semantic check failed: ``verify``, a manifest, ``--check``."""

    exit_code = 3


class MachineError(MoeccError):
    """The environment failed: disk, memory, permission, time limit, a missing extra."""

    exit_code = 4


def raise_problems(problems: Iterable[Problem], error: type[MoeccError] = InputError) -> None:
    """Raise `error` with `problems`, if there are any."""
    if every := tuple(problems):
        raise error(every)


SHOWN_PROBLEMS = 200
"""The limit on the problems of an input that are listed; more are counted."""


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


CLOSE = 0.65
"""Least similarity of a suggestion: at 0.55 ``nope`` is ``opt``, and ``model`` is ``dl``."""


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """Return a "did you mean" hint for the closest of `choices`, or None."""
    names = list(choices)
    # The beginning of a name is nearer than a short name with the same letters.
    begun = [name for name in names if len(word) > 2 and name.startswith(word)]
    matches = begun[:1] or get_close_matches(word, names, n=1, cutoff=CLOSE)
    return f"did you mean {matches[0]!r}?" if matches else None


def or_own(hint: str | None) -> str:
    """Return the hint for an unknown name, which the user's own file may define."""
    advice = "if it is your own: --load FILE"
    return f"{hint}{' ' if hint.endswith('?') else '; '}{advice}" if hint else advice


def unknown_name(kind: str, name: str, choices: Collection[str]) -> Problem:
    """Return the problem that there is no `kind` of a name; the hint has the nearest, or all."""
    hint = nearest(name, choices) or f"{kind}s: {', '.join(choices)}"
    return Problem(f"unknown {kind} {name!r}", hint=hint)


def describe_error(error: BaseException) -> str:
    """Return the class and the text of an exception, whose text may raise another."""
    try:
        text = str(error)
    except Exception as another:
        text = f"its text raises {type(another).__name__}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def is_shown(text: str) -> bool:
    """Whether a terminal shows every character of the lines of `text`, and obeys none."""
    return all(line.isprintable() for line in text.split("\n"))


def escaped(text: str) -> str:
    """Escape control and bidirectional characters but line ends and tabs, so that none is obeyed.

    A terminal obeys escape sequences, and shows a text in the order that hidden characters say.
    """
    if is_shown(text):
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def printable(name: str, limit: int = 120) -> str:
    """Escape control and bidirectional characters of an untrusted name, and cap its length."""
    text = "".join(c if c.isprintable() else _escape(c) for c in name)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


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
