"""Tokens of the text format with their offsets, and errors that point at them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from moecc.errors import InputError, Problem, printable

_TOKEN = re.compile(
    r"""
    (?P<skip>(?:[ \t\r\n]+|\#[^\n]*)+)
  | (?P<value>%[A-Za-z0-9_][A-Za-z0-9_.\-]*(?:\{[0-9.]+\}[A-Za-z0-9_.\-]*)*)
  | (?P<type>[a-z][a-z0-9]*\[[^\]\n]*\](?:\ unreduced\([^)\n]*\))?)
  | (?P<attrs>\{(?:[^{}"\n]|"(?:[^"\\\n]|\\.)*")*\})
  | (?P<loc>@[^\s]*)
  | (?P<name>[A-Za-z_][A-Za-z0-9_./\-]*)
  | (?P<number>-?(?:inf|[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?))
  | (?P<string>"(?:[^"\\\n]|\\.)*")
  | (?P<punct>[{}=,:()])
    """,
    re.VERBOSE,
)


class ParseError(InputError):
    """Text that is not a valid graph; each problem has line, column and a caret."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token: its kind, its text, and the offset at which it starts."""

    kind: str
    text: str
    at: int


def problem_at(text: str, file: str, what: str, at: int, **more: str | None) -> Problem:
    """Return a problem at offset `at` of `text`, with its line and a caret below the column."""
    line = text.count("\n", 0, at) + 1
    start = text.rfind("\n", 0, at) + 1
    column = at - start + 1
    end = text.find("\n", start)
    whole = text[start : end if end >= 0 else len(text)]
    # A long line is cut around the column, so that the caret stays on the screen.
    cut = max(0, column - 61)
    shown = printable(whole[cut : cut + 110], 110)
    pad = len(printable(whole[cut : column - 1], 110)) if column > 1 else 0
    excerpt = f"{line:5} | {shown}\n      | {' ' * pad}^"
    return Problem(f"{what}\n{excerpt}", f"{file}:{line}:{column}", **more)


class Scanner:
    """Reads the tokens of `text` one after the other.

    Attributes:
      text: the input.
      file: its name in messages.
      token: the next token; its kind is ``end`` at the end.
    """

    def __init__(self, text: str, file: str = "<text>") -> None:
        self.text = text
        self.file = file
        self.pos = 0
        self.token = Token("end", "", 0)
        self.advance()

    def advance(self) -> Token:
        """Return the next token, and scan the one after it.

        Raises:
          ParseError: the text continues with an invalid token.
        """
        before = self.token
        match = _TOKEN.match(self.text, self.pos)
        if match is not None and match.lastgroup == "skip":
            self.pos = match.end()
            match = _TOKEN.match(self.text, self.pos)
        if match is None:
            if self.pos < len(self.text):
                raise self.error(f"unexpected character {self.text[self.pos]!r}", self.pos)
            self.token = Token("end", "", self.pos)
            return before
        self.pos = match.end()
        self.token = Token(match.lastgroup or "", match.group(), match.start())
        if not self.token.text.isprintable():
            self._require_printable()
        return before

    def _require_printable(self) -> None:
        """Raise ParseError for a control character, which would be printed again as it is."""
        for at, character in enumerate(self.token.text, self.token.at):
            if character != "\t" and not character.isprintable():
                hint = "remove it, or escape it in a string"
                raise self.error("a control or invisible character", at, hint=hint)

    def jump(self, pos: int) -> None:
        """Continue at offset `pos`."""
        self.pos = pos
        self.advance()

    def expect(self, kind: str, text: str | None = None, what: str | None = None) -> Token:
        """Return the next token, which must be of `kind` (and equal `text`).

        Raises:
          ParseError: it differs.
        """
        token = self.token
        if token.kind != kind or (text is not None and token.text != text):
            found = repr(printable(token.text, 40)) if token.text else "the end of the text"
            raise self.error(f"expected {what or text or kind}, found {found}", token.at)
        return self.advance()

    def take(self, kind: str, text: str) -> bool:
        """Consume the next token if it is `text`, and return whether it was."""
        if self.token.kind != kind or self.token.text != text:
            return False
        self.advance()
        return True

    def problem(self, what: str, at: int, **more: str | None) -> Problem:
        """Return a problem at offset `at`, with its line and a caret below the place."""
        return problem_at(self.text, self.file, what, at, **more)

    def error(self, what: str, at: int, **more: str | None) -> ParseError:
        """Return a `ParseError` at offset `at`."""
        return ParseError([self.problem(what, at, **more)])

    def json_line(self) -> object:
        """Return the JSON value that fills the rest of the line after the last token read.

        Raises:
          ParseError: it is not JSON.
        """
        start = self.token.at
        end = self.text.find("\n", start)
        end = len(self.text) if end < 0 else end
        try:
            value = json.loads(self.text[start:end])
        except (ValueError, RecursionError) as error:
            at = start + getattr(error, "pos", 0)
            raise self.error(
                f"not JSON: {getattr(error, 'msg', 'nested too deeply')}", at
            ) from None
        self.jump(end)
        return value
