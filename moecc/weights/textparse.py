"""From text to a weight expression; `moecc.weights.text` shows the grammar."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NoReturn

from moecc.errors import InputError, nearest, printable
from moecc.ir.dtypes import DTYPES, DType
from moecc.ir.literals import parse_type
from moecc.ir.types import TensorType
from moecc.weights.arithmetic import Add, Cast, Moment, Mul, Scale, Select
from moecc.weights.draws import Normal, Subset, TruncatedNormal, Uniform
from moecc.weights.expr import MAX_DEPTH, Expr, Full, Source
from moecc.weights.movement import (
    Concat,
    Index,
    Merge,
    Permute,
    Rename,
    Slice,
    Split,
    Stack,
    Tile,
)

if TYPE_CHECKING:
    from moecc.ir.graph import Value

_SPACE = re.compile(r"[ \t]*")
_NAME = re.compile(r"[A-Za-z_]\w*")
_STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_NATURAL = re.compile(r"[0-9]{1,18}(?![0-9])")
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?")
_KEY = re.compile(r"0x[0-9a-fA-F]{1,32}(?![0-9a-fA-F])")
_TYPE = re.compile(r"[a-z][a-z0-9]*\[[^\]\n]*\]")


class ExprSyntaxError(ValueError):
    """Text that is not a weight expression.

    Attributes:
      offset: where in the text.
    """

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset


def parse_expr(text: str, offset: int = 0) -> tuple[Expr, int]:
    """Return the expression that `text` spells from `offset` on, and the offset of its end.

    Raises:
      ExprSyntaxError: the text is no expression.
      InputError: it is one, whose types do not fit.
    """
    reader = _Reader(text, offset)
    expr = reader.expr(1)
    return expr, reader.at


class _Reader:
    def __init__(self, text: str, at: int) -> None:
        self.text = text
        self.at = at
        self.depth = 0

    def expr(self, depth: int) -> Expr:
        """Read an expression that stands at `depth`; a deeper one may stand inside."""
        start = self.skip()
        if depth > MAX_DEPTH:
            self.fail(f"the expression nests deeper than {MAX_DEPTH}", start)
        name = self.match(_NAME, "an expression such as source(…)")
        parse = _PARSERS.get(name)
        if parse is None:
            hint = nearest(name, _PARSERS)
            known = f"; {hint}" if hint else ""
            self.fail(f"unknown weight expression {printable(name, 40)!r}{known}", start)
        self.punct("(")
        self.depth = depth + 1
        made = parse(self)
        self.punct(")")
        self.depth = depth
        return made

    def operand(self) -> Expr:
        return self.expr(self.depth)

    def operands(self) -> tuple[Expr, ...]:
        """Read expressions with commas between and after them, up to ``axis=``."""
        found = []
        while not self.ahead("axis"):
            found.append(self.operand())
            self.comma()
        return tuple(found)

    # --- tokens

    def skip(self) -> int:
        match = _SPACE.match(self.text, self.at)
        assert match is not None
        self.at = match.end()
        return self.at

    def fail(self, message: str, offset: int) -> NoReturn:
        raise ExprSyntaxError(message, offset)

    def expected(self, what: str) -> NoReturn:
        rest = self.text[self.at : self.at + 20].split("\n")[0]
        found = repr(printable(rest, 40)) if rest else "the end of the line"
        self.fail(f"expected {what}, found {found}", self.at)

    def match(self, pattern: re.Pattern[str], what: str) -> str:
        match = pattern.match(self.text, self.skip())
        if match is None:
            self.expected(what)
        self.at = match.end()
        return match.group()

    def punct(self, mark: str) -> None:
        if not self.text.startswith(mark, self.skip()):
            self.expected(mark)
        self.at += len(mark)

    def take(self, mark: str) -> bool:
        if not self.text.startswith(mark, self.skip()):
            return False
        self.at += len(mark)
        return True

    def comma(self) -> None:
        self.punct(",")

    def ahead(self, keyword: str) -> bool:
        """Whether ``keyword=`` comes next."""
        start = self.skip()
        return self.text.startswith(keyword, start) and self.text.startswith(
            "=", start + len(keyword)
        )

    def keyword(self, name: str) -> None:
        if not self.ahead(name):
            self.expected(f"{name}=")
        self.at += len(name) + 1

    def optional(self, name: str) -> bool:
        """Read ``, name=`` if it comes next, and say whether it did."""
        start = self.at
        if self.take(",") and self.ahead(name):
            self.keyword(name)
            return True
        self.at = start
        return False

    # --- values

    def name(self, what: str = "the name of an axis") -> str:
        return self.match(_NAME, what)

    def axis(self) -> str:
        """Read ``, axis=`` for an axis of any name."""
        self.comma()
        name = self.name()
        self.punct("=")
        return name

    def names(self) -> tuple[str, ...]:
        self.punct("(")
        found: list[str] = []
        while not self.take(")"):
            if found:
                self.comma()
            found.append(self.name())
        return tuple(found)

    def natural(self) -> int:
        return int(self.match(_NATURAL, "a whole number"))

    def number(self) -> float:
        start = self.skip()
        value = float(self.match(_NUMBER, "a number"))
        if math.isinf(value):
            self.fail("the number is too large", start)
        return value

    def key(self) -> int:
        self.comma()
        self.keyword("key")
        return int(self.match(_KEY, "a key of up to 32 hexadecimal digits, 0x…"), 16)

    def string(self) -> str:
        start = self.skip()
        quoted = self.match(_STRING, "a string in double quotes")
        try:
            value = json.loads(quoted)
        except ValueError:
            self.fail("not a string", start)
        assert isinstance(value, str)
        return value

    def dtype(self) -> DType:
        start = self.skip()
        name = self.name("an element type")
        if name not in DTYPES:
            hint = nearest(name, DTYPES)
            known = f"; {hint}" if hint else ""
            self.fail(f"unknown element type {printable(name, 40)!r}{known}", start)
        return DTYPES[name]

    def type(self) -> TensorType:
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


_REMEMBERED = 4096
_types: dict[str, TensorType] = {}


def _no_values(name: str) -> Value:
    raise InputError("a weight has fixed sizes only", found=f"%{name}")


def _source(r: _Reader) -> Expr:
    name = r.string()
    r.punct(":")
    return Source(name, r.type())


def _full(r: _Reader) -> Expr:
    value = r.number()
    r.punct(":")
    return Full(value, r.type())


def _tile(r: _Reader) -> Expr:
    x, axis, size = r.operand(), r.axis(), r.natural()
    return Tile(x, axis, size, _position(r))


def _stack(r: _Reader) -> Expr:
    xs = r.operands()
    r.keyword("axis")
    return Stack(xs, r.name(), _position(r))


def _position(r: _Reader) -> int:
    return r.natural() if r.optional("position") else 0


def _concat(r: _Reader) -> Expr:
    xs = r.operands()
    r.keyword("axis")
    return Concat(xs, r.name())


def _index(r: _Reader) -> Expr:
    return Index(r.operand(), r.axis(), r.natural())


def _slice(r: _Reader) -> Expr:
    x, axis, start = r.operand(), r.axis(), r.natural()
    r.punct(":")
    return Slice(x, axis, start, r.natural())


def _split(r: _Reader) -> Expr:
    x, axis = r.operand(), r.axis()
    into: list[tuple[str, int]] = []
    r.punct("(")
    while not r.take(")"):
        if into:
            r.comma()
        name = r.name()
        r.punct("=")
        into.append((name, r.natural()))
    return Split(x, axis, tuple(into))


def _merge(r: _Reader) -> Expr:
    x = r.operand()
    r.comma()
    axes = r.names()
    r.punct("=")
    return Merge(x, axes, r.name())


def _rename(r: _Reader) -> Expr:
    return Rename(r.operand(), r.axis(), r.name())


def _permute(r: _Reader) -> Expr:
    x = r.operand()
    r.comma()
    return Permute(x, r.names())


def _scale(r: _Reader) -> Expr:
    x = r.operand()
    r.comma()
    return Scale(x, r.number())


def _cast(r: _Reader) -> Expr:
    x = r.operand()
    r.comma()
    return Cast(x, r.dtype())


def _pair(r: _Reader) -> tuple[Expr, Expr]:
    a = r.operand()
    r.comma()
    return a, r.operand()


def _select(r: _Reader) -> Expr:
    mask = r.operand()
    r.comma()
    return Select(mask, *_pair(r))


def _moment(kind: Literal["mean", "std"]) -> Callable[[_Reader], Expr]:
    def parse(r: _Reader) -> Expr:
        x = r.operand()
        if r.optional("keep"):
            return Moment(kind, x, None, r.names())
        mask = r.operand() if r.take(",") else None
        return Moment(kind, x, mask, r.names() if r.optional("keep") else ())

    return parse


def _spread(r: _Reader) -> tuple[TensorType, float]:
    type = r.type()
    r.comma()
    r.keyword("std")
    return type, r.number()


def _normal(r: _Reader) -> Expr:
    type, std = _spread(r)
    mean = r.number() if r.optional("mean") else 0.0
    return Normal(type, std, r.key(), mean)


def _truncated(r: _Reader) -> Expr:
    type, std = _spread(r)
    bound = r.number() if r.optional("bound") else 3.0
    return TruncatedNormal(type, std, r.key(), bound)


def _uniform(r: _Reader) -> Expr:
    type = r.type()
    r.comma()
    r.keyword("low")
    low = r.number()
    r.comma()
    r.keyword("high")
    return Uniform(type, low, r.number(), r.key())


def _subset(r: _Reader) -> Expr:
    type = r.type()
    r.comma()
    r.keyword("axis")
    axis = r.name()
    r.comma()
    r.keyword("count")
    return Subset(type, axis, r.natural(), r.key())


_PARSERS: dict[str, Callable[[_Reader], Expr]] = {
    "source": _source,
    "full": _full,
    "tile": _tile,
    "stack": _stack,
    "concat": _concat,
    "index": _index,
    "slice": _slice,
    "split": _split,
    "merge": _merge,
    "rename": _rename,
    "permute": _permute,
    "scale": _scale,
    "cast": _cast,
    "add": lambda r: Add(*_pair(r)),
    "mul": lambda r: Mul(*_pair(r)),
    "select": _select,
    "mean": _moment("mean"),
    "std": _moment("std"),
    "normal": _normal,
    "truncated_normal": _truncated,
    "uniform": _uniform,
    "subset": _subset,
}
