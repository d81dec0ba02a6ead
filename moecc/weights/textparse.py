"""Parse weight expressions; `moecc.weights.text` shows the grammar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from moecc.errors import nearest, printable
from moecc.types.tensor import TensorType
from moecc.weights.arithmetic import Add, Cast, Minimum, Moment, Mul, Scale, Select
from moecc.weights.draws import Normal, Subset, TruncatedNormal, Uniform
from moecc.weights.each import in_full
from moecc.weights.expr import MAX_DEPTH, Expr, Full, Source
from moecc.weights.fits import Fitted
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
from moecc.weights.orders import Clusters, Permutation, Take
from moecc.weights.textscan import Cursor
from moecc.weights.textscan import ExprSyntaxError as ExprSyntaxError


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
