"""Scan the texts of graphs, weight expressions, pipelines and formulas, with one kind of error.

A grammar is a parser that holds a `Scanner`: it matches patterns at the cursor, and raises the
scanner's errors, which have the line, the column, and a caret below it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from moecc.errors import InputError, Problem, nearest, printable

T = TypeVar("T")

BLANKS = re.compile(r"[ \t]*")
"""What separates tokens within a line."""

WORD = re.compile(r"[A-Za-z_]\w*")
STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"')

_UNEXPECTED = re.compile(r"%?\w+|[^\n]")


class ParseError(InputError):
    """Text that violates its grammar; each problem has line, column and a caret.

    Attributes:
      message: the first problem, without its position.
      offset: the offset of the first problem.
    """

    def __init__(self, problems: Iterable[Problem], message: str = "", offset: int = 0) -> None:
        super().__init__(problems)
        self.message = message
        self.offset = offset


class Scanner:
    """A cursor over a text.

    Attributes:
      text: the input.
      file: its name in messages.
      at: the offset of the cursor.
      blanks: what `skip` skips; every method but `skip` itself skips it first.
    """

    def __init__(
        self, text: str, file: str = "<text>", at: int = 0, blanks: re.Pattern[str] = BLANKS
    ) -> None:
        self.text = text
        self.file = file
        self.at = at
        self.blanks = blanks
        self._token = -1

    def skip(self) -> int:
        """Skip blanks, and return the offset of the next token."""
        # A token is looked at several times before it is consumed: in expressions of 35,000
        # tensors, blanks before it were matched two and a half times on average.
        if self.at != self._token:
            match = self.blanks.match(self.text, self.at)
            if match is not None:
                self.at = match.end()
            self._token = self.at
        return self.at

    def is_at_end(self) -> bool:
        """Return whether nothing but blanks is left."""
        return self.skip() == len(self.text)

    def is_ahead(self, mark: str) -> bool:
        """Return whether `mark` comes next."""
        return self.text.startswith(mark, self.skip())

    def is_match(self, pattern: re.Pattern[str]) -> bool:
        """Return whether `pattern` matches at the cursor."""
        return pattern.match(self.text, self.skip()) is not None

    def take(self, mark: str) -> bool:
        """Consume `mark` if it comes next, and return whether it did."""
        if not self.text.startswith(mark, self.skip()):
            return False
        self.at += len(mark)
        return True

    def expect(self, mark: str) -> None:
        """Consume `mark`. Raises: ParseError."""
        if not self.take(mark):
            raise self.expected(mark)

    def match(self, pattern: re.Pattern[str], description: str) -> str:
        """Consume and return what `pattern` matches. Raises: ParseError."""
        match = pattern.match(self.text, self.skip())
        if match is None:
            raise self.expected(description)
        self.at = match.end()
        return match.group()

    def string(self) -> str:
        """Consume a JSON string, and return its value. Raises: ParseError."""
        start = self.skip()
        quoted = self.match(STRING, "a string in double quotes")
        try:
            value = json.loads(quoted)
        except ValueError:
            raise self.error("not a string", start) from None
        assert isinstance(value, str)
        return value

    def lookup(self, name: str, table: Mapping[str, T], kind: str, at: int) -> T:
        """Return the entry `name` of `table`. Raises: ParseError with the nearest name."""
        if name not in table:
            message = f"unknown {kind} {printable(name, 40)!r}"
            raise self.error(message, at, hint=nearest(name, table))
        return table[name]

    def problem(self, message: str, at: int, **more: str | None) -> Problem:
        """Return a problem at offset `at`, with its line and a caret below the column."""
        line = self.text.count("\n", 0, at) + 1
        start = self.text.rfind("\n", 0, at) + 1
        column = at - start + 1
        end = self.text.find("\n", start)
        content = self.text[start : end if end >= 0 else len(self.text)]
        # A long line is cut around the column, so that the caret stays on the screen.
        cut = max(0, column - 61)
        shown = printable(content[cut : cut + 110], 110)
        pad = len(printable(content[cut : column - 1], 110)) if column > 1 else 0
        excerpt = f"{line:5} | {shown}\n      | {' ' * pad}^"
        return Problem(f"{message}\n{excerpt}", f"{self.file}:{line}:{column}", **more)

    def error(self, message: str, at: int, **more: str | None) -> ParseError:
        """Return an error at offset `at`."""
        return ParseError([self.problem(message, at, **more)], message, at)

    def expected(self, description: str, hint: str | None = None) -> ParseError:
        """Return an error at the cursor: what was expected there, and what was found."""
        match = _UNEXPECTED.match(self.text, self.at)
        end = "the end of the line" if self.at < len(self.text) else "the end of the text"
        token = repr(printable(match.group(), 40)) if match is not None else end
        return self.error(f"expected {description}, found {token}", self.at, hint=hint)
