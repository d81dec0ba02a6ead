"""Formulas: the text of a function of one number, which the operation `pointwise` carries.

``mul(a, tanh(logaddexp(a, 0.0)))`` is Mish.  ``a`` is the operand; what is used more than once may
have a name, ``b = exp(a); div(b, add(1.0, b))``.  Every function is named in `FUNCTIONS`, so the
text means the same wherever it is read; backends have one implementation of each name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from moecc.errors import InputError, nearest
from moecc.support.scan import WORD, ParseError, Scanner

OPERAND = "a"
"""The name of the operand."""

MAX_CHARACTERS = 4000
"""The limit on the text: published activations have below 200."""

_FLOAT, _BOOL = "number", "truth value"
_BLANKS = re.compile(r"\s*")
_ASSIGNED = re.compile(r"[A-Za-z_]\w*\s*=")
_CALLED = re.compile(r"[A-Za-z_]\w*\s*\(")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|(?:inf|nan)(?!\w))")

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
class FormulaStep:
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

    steps: tuple[FormulaStep, ...]
    result: int

    def evaluate(self, functions: Mapping[str, Callable[..., T]], operand: T) -> T:
        """Return the value for `operand`; `functions` implement the names."""
        values = [operand]
        for step in self.steps:
            arguments = (values[x] if isinstance(x, int) else x for x in step.arguments)
            values.append(functions[step.function](*arguments))
        return values[self.result]

    def __str__(self) -> str:
        uses = [0] * (len(self.steps) + 1)
        for step in self.steps:
            for x in step.arguments:
                if isinstance(x, int):
                    uses[x] += 1
        texts, lines = [OPERAND], list[str]()
        for number, step in enumerate(self.steps, 1):
            arguments = (texts[x] if isinstance(x, int) else repr(x) for x in step.arguments)
            text = f"{step.function}({', '.join(arguments)})"
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
    try:
        return _FormulaParser(text).formula()
    except ParseError as error:
        raise InputError(f"not a formula: {text}", found=error.message) from None


class _FormulaParser:
    """Parses one formula from left to right; nesting is bounded by the length of the text."""

    def __init__(self, text: str) -> None:
        self.scan = Scanner(text, blanks=_BLANKS)
        self.names: dict[str, int] = {OPERAND: 0}
        self.steps: list[FormulaStep] = []
        self.kinds = [_FLOAT]

    def formula(self) -> Formula:
        scan = self.scan
        while scan.is_match(_ASSIGNED):
            name = scan.match(WORD, "a name")
            scan.expect("=")
            self.names[name] = self.step()
            scan.expect(";")
        result = self.step()
        if not scan.is_at_end():
            raise scan.expected("the end of the formula")
        if self.kinds[result] != _FLOAT:
            raise InputError("the formula does not give a number", found=scan.text)
        return Formula(tuple(self.steps), result)

    def step(self) -> int:
        """Parse an expression that depends on the operand."""
        value = self.expression()
        if isinstance(value, float):
            raise InputError("a formula is a function of its operand", found=self.scan.text)
        return value

    def expression(self) -> int | float:
        """Parse an expression without recursion: open calls are on a stack."""
        scan = self.scan
        stack: list[tuple[str, list[int | float]]] = []
        while True:
            if scan.is_match(_CALLED):
                stack.append((scan.match(WORD, "a function"), []))
                scan.expect("(")
                continue
            value: int | float
            if scan.is_match(_NUMBER):
                value = float(scan.match(_NUMBER, "a number"))
            else:
                start = scan.skip()
                description = f"a number, a function, or one of {', '.join(self.names)}"
                name = scan.match(WORD, description)
                value = scan.lookup(name, self.names, "name", start)
            while stack:
                stack[-1][1].append(value)
                if scan.take(","):
                    break
                scan.expect(")")
                value = self.call(*stack.pop())
            else:
                return value

    def call(self, name: str, arguments: list[int | float]) -> int:
        signature = FUNCTIONS.get(name)
        if signature is None:
            raise InputError(f"a formula has no function {name!r}", hint=nearest(name, FUNCTIONS))
        kinds = tuple(self.kinds[x] if isinstance(x, int) else _FLOAT for x in arguments)
        if kinds != signature.takes:
            raise InputError(
                f"{name} takes other arguments in a formula",
                expected=", ".join(signature.takes),
                found=", ".join(kinds) or "none",
            )
        self.steps.append(FormulaStep(name, tuple(arguments)))
        self.kinds.append(signature.gives)
        return len(self.steps)
