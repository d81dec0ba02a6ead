"""Formulas: the text of a function of one number, which the operation `pointwise` carries.

``mul(a, tanh(logaddexp(a, 0.0)))`` is Mish.  ``a`` is the operand; what is used more than once may
have a name, ``b = exp(a); div(b, add(1.0, b))``.  Every function is named in `FUNCTIONS`, so the
text means the same wherever it is read; backends have one implementation of each name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from moecc.errors import InputError, nearest

OPERAND = "a"
"""The name of the operand."""

MAX_CHARACTERS = 4000
"""The limit on the text: published activations have below 200."""

_FLOAT, _BOOL = "number", "truth value"
_TOKEN = re.compile(r"\s*([A-Za-z_]\w*|[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|inf|nan)|[(),;=])")
_NUMBER = re.compile(r"[-+]?(?:\d|inf\Z|nan\Z)")

T = TypeVar("T")


@dataclass(frozen=True)
class Signature:
    """The kinds of the arguments of a function, and of its result."""

    takes: tuple[str, ...]
    gives: str


def _of(names: str, takes: tuple[str, ...], gives: str) -> dict[str, Signature]:
    return dict.fromkeys(names.split(), Signature(takes, gives))


FUNCTIONS: Mapping[str, Signature] = {
    **_of(
        "neg abs sign exp exp2 expm1 log log1p sin cos tan asin acos atan sinh cosh tanh asinh "
        "acosh atanh sigmoid sqrt rsqrt cbrt square erf erfc floor ceil round relu relu6 "
        "stop_gradient wide narrow",
        (_FLOAT,),
        _FLOAT,
    ),
    **_of("add sub mul div pow maximum minimum atan2 logaddexp", (_FLOAT, _FLOAT), _FLOAT),
    **_of("clamp", (_FLOAT, _FLOAT, _FLOAT), _FLOAT),
    **_of(
        "less less_equal greater greater_equal equal not_equal", (_FLOAT, _FLOAT), _BOOL
    ),
    **_of("and or xor", (_BOOL, _BOOL), _BOOL),
    **_of("not", (_BOOL,), _BOOL),
    **_of("where", (_BOOL, _FLOAT, _FLOAT), _FLOAT),
}  # fmt: skip
"""By name.  ``wide`` computes in float32 at least from there on, ``narrow`` in the type of the
operand again; both are the identity on numbers.  ``relu`` and ``relu6`` have the derivative 0 in
their kinks, ``maximum(a, 0.0)`` one half.  ``clamp`` takes the bounds first and last."""


@dataclass(frozen=True)
class Call:
    """A function applied to the results of earlier steps, or to numbers."""

    function: str
    arguments: tuple[int | float, ...]


@dataclass(frozen=True)
class Formula:
    """A formula, parsed.

    Attributes:
      steps: calls in order; an ``int`` argument i is the result of step i − 1, and 0 the operand.
      result: the step that is the result, numbered likewise.
    """

    steps: tuple[Call, ...]
    result: int

    def evaluate(self, functions: Mapping[str, Callable[..., T]], operand: T) -> T:
        """Return the value for `operand`; `functions` implement the names."""
        values = [operand]
        for step in self.steps:
            given = (values[x] if isinstance(x, int) else x for x in step.arguments)
            values.append(functions[step.function](*given))
        return values[self.result]

    def __str__(self) -> str:
        uses = [0] * (len(self.steps) + 1)
        for step in self.steps:
            for x in step.arguments:
                if isinstance(x, int):
                    uses[x] += 1
        texts, lines = [OPERAND], list[str]()
        for number, step in enumerate(self.steps, 1):
            given = (texts[x] if isinstance(x, int) else repr(x) for x in step.arguments)
            text = f"{step.function}({', '.join(given)})"
            if uses[number] > 1 and number != self.result:
                lines.append(f"t{len(lines)} = {text}; ")
                text = f"t{len(lines) - 1}"
            texts.append(text)
        return "".join(lines) + texts[self.result]


@lru_cache(maxsize=256)
def parse_formula(text: str) -> Formula:
    """Return the formula `text`.

    Raises:
      InputError: it is no formula of one operand that gives a number.
    """
    if len(text) > MAX_CHARACTERS:
        raise InputError(
            "a formula of this length is not read",
            expected=f"at most {MAX_CHARACTERS:,} characters",
            found=f"{len(text):,}",
        )
    return _Parser(text).formula()


class _Parser:
    """Reads one formula from left to right; nesting is bounded by the length of the text."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = list(_tokens(text))
        self._at = 0
        self._names: dict[str, int] = {OPERAND: 0}
        self._steps: list[Call] = []
        self._kinds = [_FLOAT]

    def formula(self) -> Formula:
        while self._peek(1) == "=":
            name = self._next()
            self._next()
            self._names[name] = self._step(self._expression())
            self._expect(";")
        result = self._step(self._expression())
        if self._at != len(self._tokens):
            raise self._error("the end", self._tokens[self._at])
        if self._kinds[result] != _FLOAT:
            raise InputError("the formula does not give a number", found=self._text)
        return Formula(tuple(self._steps), result)

    def _step(self, value: int | float) -> int:
        if isinstance(value, int):
            return value
        raise InputError("a formula is a function of its operand", found=self._text)

    def _expression(self) -> int | float:
        """Read an expression without recursion: open calls are on a stack."""
        stack: list[tuple[str, list[int | float]]] = []
        while True:
            if self._peek(1) == "(":
                stack.append((self._next(), []))
                self._next()
                continue
            value = self._atom()
            while stack:
                stack[-1][1].append(value)
                if self._peek() == ",":
                    self._next()
                    break
                self._expect(")")
                value = self._call(*stack.pop())
            else:
                return value

    def _atom(self) -> int | float:
        token = self._next()
        if _NUMBER.match(token):
            return float(token)
        if token in self._names:
            return self._names[token]
        raise self._error(f"a number, a function, or one of {', '.join(self._names)}", token)

    def _call(self, name: str, given: list[int | float]) -> int:
        found = FUNCTIONS.get(name)
        if found is None:
            raise InputError(f"a formula has no function {name!r}", hint=nearest(name, FUNCTIONS))
        kinds = tuple(self._kinds[x] if isinstance(x, int) else _FLOAT for x in given)
        if kinds != found.takes:
            raise InputError(
                f"{name} takes other arguments in a formula",
                expected=", ".join(found.takes),
                found=", ".join(kinds) or "none",
            )
        self._steps.append(Call(name, tuple(given)))
        self._kinds.append(found.gives)
        return len(self._steps)

    def _peek(self, ahead: int = 0) -> str:
        at = self._at + ahead
        return self._tokens[at] if at < len(self._tokens) else ""

    def _next(self) -> str:
        token = self._peek()
        if not token:
            raise self._error("more", "the end")
        self._at += 1
        return token

    def _expect(self, token: str) -> None:
        found = self._next()
        if found != token:
            raise self._error(repr(token), found)

    def _error(self, expected: str, found: str) -> InputError:
        return InputError(f"not a formula: {self._text}", expected=expected, found=found)


def _tokens(text: str) -> Iterator[str]:
    at = 0
    while at < len(text.rstrip()):
        match = _TOKEN.match(text, at)
        if match is None:
            raise InputError(f"not a formula: {text}", found=text[at : at + 20])
        yield match.group(1)
        at = match.end()
