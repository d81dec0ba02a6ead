"""The scanner of weight expression texts, with errors that state the offset."""

from __future__ import annotations

import json
import math
import re
from typing import NoReturn

from moecc.errors import InputError, nearest, printable
from moecc.types.dtypes import DTYPES, DType
from moecc.types.ranges import Progression
from moecc.types.tensor import TensorType
from moecc.types.text import parse_type

_SPACE = re.compile(r"[ \t]*")
_NAME = re.compile(r"[A-Za-z_]\w*")
_STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_NATURAL = re.compile(r"[0-9]{1,18}(?![0-9])")
_RANGE = re.compile(r"[0-9]{1,9}\.\.[0-9]{1,9}(?:\.\.[0-9]{1,9})?(?![0-9.])")
_PIECE = re.compile(r'"(?:[^"\\\n]|\\.)*"|[^"()\[\],\n]+|.|\n')
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?")
_KEY = re.compile(r"0x[0-9a-fA-F]{1,32}(?![0-9a-fA-F])")
_TYPE = re.compile(r"[a-z][a-z0-9]*\[[^\]\n]*\]")

# Cached: a model has thousands of tensors of a few types.
_types: dict[str, TensorType] = {}
_REMEMBERED = 4096


class ExprSyntaxError(ValueError):
    """Text that is not a weight expression.

    Attributes:
      offset: the offset in the text.
    """

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset


class Cursor:
    """A position in a text, which advances with every token.

    Every method that parses raises `ExprSyntaxError` on other input.

    Attributes:
      text: the input.
      at: the offset of the next token.
    """

    def __init__(self, text: str, at: int) -> None:
        self.text = text
        self.at = at

    def skip(self) -> int:
        """Skip blanks; return the offset of the next token."""
        match = _SPACE.match(self.text, self.at)
        assert match is not None
        self.at = match.end()
        return self.at

    def fail(self, message: str, offset: int) -> NoReturn:
        """Raise an error at `offset`."""
        raise ExprSyntaxError(message, offset)

    def expected(self, what: str) -> NoReturn:
        """Raise an error with what was expected here and what was found."""
        rest = self.text[self.at : self.at + 20].split("\n")[0]
        found = repr(printable(rest, 40)) if rest else "the end of the line"
        self.fail(f"expected {what}, found {found}", self.at)

    def match(self, pattern: re.Pattern[str], what: str) -> str:
        """Consume text that `pattern` matches."""
        match = pattern.match(self.text, self.skip())
        if match is None:
            self.expected(what)
        self.at = match.end()
        return match.group()

    def punct(self, mark: str) -> None:
        """Consume a punctuation mark."""
        if not self.text.startswith(mark, self.skip()):
            self.expected(mark)
        self.at += len(mark)

    def take(self, mark: str) -> bool:
        """Consume a mark if it comes next, and return whether it did."""
        if not self.text.startswith(mark, self.skip()):
            return False
        self.at += len(mark)
        return True

    def comma(self) -> None:
        """Consume a comma."""
        self.punct(",")

    def ahead(self, keyword: str) -> bool:
        """Whether ``keyword=`` comes next."""
        start = self.skip()
        return self.text.startswith(keyword, start) and self.text.startswith(
            "=", start + len(keyword)
        )

    def keyword(self, name: str) -> None:
        """Consume ``name=``."""
        if not self.ahead(name):
            self.expected(f"{name}=")
        self.at += len(name) + 1

    def optional(self, name: str) -> bool:
        """Consume ``, name=`` if it comes next, and return whether it did."""
        start = self.at
        if self.take(",") and self.ahead(name):
            self.keyword(name)
            return True
        self.at = start
        return False

    def name(self, what: str = "the name of an axis") -> str:
        """Parse a name."""
        return self.match(_NAME, what)

    def axis(self) -> str:
        """Parse ``, axis=`` and the name of an axis."""
        self.comma()
        name = self.name()
        self.punct("=")
        return name

    def names(self) -> tuple[str, ...]:
        """Parse names in parentheses."""
        self.punct("(")
        found: list[str] = []
        while not self.take(")"):
            if found:
                self.comma()
            found.append(self.name())
        return tuple(found)

    def natural(self) -> int:
        """Parse an integer that is not negative."""
        return int(self.match(_NATURAL, "a whole number"))

    def range(self) -> Progression:
        """Parse ``first..last``, or ``first..last..step``, of at least two numbers."""
        start = self.skip()
        numbers = map(int, self.match(_RANGE, "a range, 0..29").split(".."))
        low, high, step, *_ = (*numbers, 1)
        if step < 1 or high <= low or (high - low) % step:
            self.fail("a range must rise in equal steps", start)
        return Progression(low, step, (high - low) // step + 1)

    def end_of_argument(self) -> int:
        """Return the end of the argument that starts here: before a comma or parenthesis."""
        depth, end = 0, self.at
        for match in _PIECE.finditer(self.text, self.at):
            mark, end = match.group(), match.end()
            if mark == "\n" or (not depth and mark in (",", ")")):
                return match.start()
            depth += (mark in ("(", "[")) - (mark in (")", "]"))
        return end

    def number(self) -> float:
        """Parse a finite number."""
        start = self.skip()
        value = float(self.match(_NUMBER, "a number"))
        if math.isinf(value):
            self.fail("the number is too large", start)
        return value

    def key(self) -> int:
        """Parse ``, key=`` and a 128-bit number."""
        self.comma()
        self.keyword("key")
        return int(self.match(_KEY, "a key of up to 32 hexadecimal digits, 0x…"), 16)

    def string(self) -> str:
        """Parse a string in double quotes."""
        start = self.skip()
        quoted = self.match(_STRING, "a string in double quotes")
        try:
            value = json.loads(quoted)
        except ValueError:
            self.fail("not a string", start)
        assert isinstance(value, str)
        return value

    def dtype(self) -> DType:
        """Parse the name of an element type."""
        start = self.skip()
        name = self.name("an element type")
        if name not in DTYPES:
            hint = nearest(name, DTYPES)
            known = f"; {hint}" if hint else ""
            self.fail(f"unknown element type {printable(name, 40)!r}{known}", start)
        return DTYPES[name]

    def type(self) -> TensorType:
        """Parse a type."""
        start = self.skip()
        text = self.match(_TYPE, "a type such as f32[mlp=8]")
        known = _types.get(text)
        if known is None:
            try:
                known = parse_type(text, _no_values)
            except InputError as error:
                self.fail(str(error.problems[0]), start)
            if len(_types) < _REMEMBERED:
                _types[text] = known
        return known


def _no_values(name: str) -> NoReturn:
    raise InputError("a weight has fixed sizes only", found=f"%{name}")
