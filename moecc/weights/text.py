"""The text of a weight expression, on one line, which parses back to the same expression.

expr     = name "(" … ")"
source("name" : bf16[mlp=1536, embed=576])      full(0.5 : f32[expert=8])
tile(x, expert=8)  tile(x, expert=8, position=1)
stack(x, y, axis=expert)  concat(x, y, axis=mlp)
each(expert=0..7, source("experts.{expert}.w" : bf16[mlp=1536]))  for a stack of eight
index(x, expert=3)  slice(x, mlp=0:768)  rename(x, mlp=inner)  permute(x, (embed, mlp))
split(x, mlp=(group=2, mlp=768))  merge(x, (group, mlp)=mlp)
scale(x, 2.0)  cast(x, f32)  add(x, y)  mul(x, y)  minimum(x, y)  select(mask, x, y)
mean(x, keep=(expert))  std(x, mask)
normal(f32[expert=8], std=0.02, key=0x1f)  with mean=0.5
truncated_normal(f32[expert=8], std=0.02, key=0x1f)  with bound=2.0
uniform(f32[expert=8], low=-0.1, high=0.1, key=0x1f)
subset(pred[expert=8, mlp=1536], axis=mlp, count=768, key=0x1f)
take(x, mlp=order)  permutation(i32[mlp=1536], key=0x1f)
clusters(counts, axis=mlp, first=384, groups=6)
fitted(covariance, mean, cross, ridge=0.01, std=0.02)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Literal, NoReturn

from moecc.errors import InputError, nearest, printable
from moecc.support.ranges import Progression
from moecc.types import DTYPES, DType, TensorType, parse_type
from moecc.weights.arithmetic import Add, Cast, Minimum, Moment, Mul, Scale, Select
from moecc.weights.draws import Normal, Subset, TruncatedNormal, Uniform
from moecc.weights.expr import MAX_DEPTH, Expr, Full, Source
from moecc.weights.fits import Fitted
from moecc.weights.movement import (
    Clusters,
    Concat,
    Index,
    Merge,
    Permutation,
    Permute,
    Rename,
    Slice,
    Split,
    Stack,
    Take,
    Tile,
    in_full,
)

# The scanner of weight expression texts, with errors that state the offset.

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


# Parse weight expressions; `moecc.weights.text` shows the grammar.


def parse_expr(text: str, offset: int = 0) -> tuple[Expr, int]:
    """Return the expression parsed from `text` at `offset`, and the offset of its end.

    Raises:
      ExprSyntaxError: the text is not an expression.
      InputError: the expression has a type error.
    """
    reader = _Reader(text, offset)
    expr = reader.expr(1)
    return expr, reader.at


MAX_EACH = 100_000
"""The limit on expressions that all ranges of one expression expand to."""


class _Reader(Cursor):
    def __init__(self, text: str, at: int, around: _Reader | None = None) -> None:
        super().__init__(text, at)
        self.depth = 0
        # Shared with the parsers of the expanded texts of an `each`.
        self.left: list[int] = [MAX_EACH] if around is None else around.left

    def expr(self, depth: int) -> Expr:
        """Parse an expression at nesting depth `depth`."""
        start = self.skip()
        if depth > MAX_DEPTH:
            self.fail(f"the expression nests deeper than {MAX_DEPTH}", start)
        name = self.name("an expression such as source(…)")
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

    def inner(self, text: str, at: int) -> Expr:
        """Parse all of another `text`, whose errors are reported at `at`."""
        reader = _Reader(text, 0, self)
        try:
            found = reader.expr(self.depth)
        except ExprSyntaxError as error:
            self.fail(f"in {printable(text, 60)!r}: {error}", at)
        if reader.skip() != len(text):
            self.fail(f"in {printable(text, 60)!r}: more than one expression", at)
        return found

    def operand(self) -> Expr:
        return self.expr(self.depth)

    def operands(self) -> tuple[Expr, ...]:
        """Parse operands separated by commas, up to ``axis=``."""
        found = []
        while not self.ahead("axis"):
            found.append(self.operand())
            self.comma()
        return tuple(found)


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


def _each(r: _Reader) -> Expr:
    axis = r.name()
    r.punct("=")
    begin = r.skip()
    numbers = r.range()
    r.left[0] -= numbers.count
    if r.left[0] < 0:
        r.fail(f"an expression expands to more than {MAX_EACH:,} others", begin)
    r.comma()
    start = r.skip()
    # The marks are substituted, and the resulting texts are parsed one by one.
    end = r.end_of_argument()
    texts = in_full(r.text[start:end], axis, numbers)
    xs = tuple(r.inner(text, start) for text in texts)
    r.at = end
    return Stack(xs, axis, _position(r))


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


def _take(r: _Reader) -> Expr:
    return Take(r.operand(), r.axis(), r.operand())


def _permutation(r: _Reader) -> Expr:
    return Permutation(r.type(), r.key())


def _clusters(r: _Reader) -> Expr:
    counts = r.operand()
    r.comma()
    r.keyword("axis")
    axis = r.name()
    r.comma()
    r.keyword("first")
    first = r.natural()
    r.comma()
    r.keyword("groups")
    return Clusters(counts, axis, first, r.natural())


def _fitted(r: _Reader) -> Expr:
    covariance = r.operand()
    r.comma()
    mean, cross = _pair(r)
    r.comma()
    r.keyword("ridge")
    ridge = r.number()
    r.comma()
    r.keyword("std")
    return Fitted(covariance, mean, cross, ridge, r.number())


_PARSERS: dict[str, Callable[[_Reader], Expr]] = {
    "source": _source,
    "full": _full,
    "tile": _tile,
    "stack": _stack,
    "each": _each,
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
    "minimum": lambda r: Minimum(*_pair(r)),
    "select": _select,
    "mean": _moment("mean"),
    "std": _moment("std"),
    "normal": _normal,
    "truncated_normal": _truncated,
    "take": _take,
    "permutation": _permutation,
    "clusters": _clusters,
    "fitted": _fitted,
    "uniform": _uniform,
    "subset": _subset,
}


def format_expr(expr: Expr) -> str:
    """Return the text of `expr`, which `parse_expr` parses back."""
    return str(expr)
