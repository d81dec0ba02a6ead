"""Traits: what the rest of moecc may rely on of an operation, stated once in its row.

A trait is a fact about the meaning of an operation, not a flag for one reader.  Everything else
is derived: whether an operation may be used inside an expert, is fused into the product that
reads it, or passes a parameter on to its use.  `tests/ir/test_traits.py` evaluates every operation
and fails for a row with a wrong trait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import TYPE_CHECKING

from moecc.ir.operand import Attrs, Definition

if TYPE_CHECKING:
    from moecc.ir.mesh import Mesh
    from moecc.types import Size


@dataclass(frozen=True)
class Residual:
    """The values that the derivative of an operation reads and a gradient keeps.

    Attributes:
      operands: the positions of the operands that it reads.
      result: whether it reads the first result.
      of: the operands that have a gradient; all floating-point ones if empty.  Position tables
        are floating-point, and nothing that they depend on is trained.
    """

    operands: tuple[int, ...] = ()
    result: bool = False
    of: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.operands) or self.result


NOTHING = Residual()
"""The derivative is constant."""

OPERAND = Residual((0,))
"""The derivative reads the first operand."""

RESULT = Residual((), result=True)
"""The derivative is a polynomial of the result, which the next operation often keeps anyway."""

BOTH = Residual((0,), result=True)
"""The derivative reads the operand, and the result saves it a reduction."""

PAIR = Residual((0, 1))
"""The derivative in each of two operands reads the other one."""


@dataclass(frozen=True)
class Homogeneity:
    """The effect of positive factors on the operands on the result.

    Attributes:
      degrees: by operand; the result is multiplied by the product of the factors to these powers.
        None marks an operand that must not have a factor.
      alike: all operands with a degree must have the same factor, which the result then has, too.
    """

    degrees: tuple[float | None, ...]
    alike: bool = False

    def factor(self, values: Sequence[float]) -> float | None:
        """Return the factor on the result if the operands have the factors `values`, or None."""
        pairs = self._together(values, 1.0, lambda a, b: abs(a / b - 1) < 1e-12)
        if pairs is None or self.alike:
            return pairs[0][0] if pairs else None
        return prod(float(f**d) for f, d in pairs)

    def degree(self, values: Sequence[float]) -> float | None:
        """Return the degree of the result if the operands have the degrees `values`, or None."""
        pairs = self._together(values, 0.0, lambda a, b: a == b)
        if pairs is None or self.alike:
            return pairs[0][0] if pairs else None
        return sum(g * d for g, d in pairs)

    def _together(
        self, values: Sequence[float], neutral: float, same: Callable[[float, float], bool]
    ) -> list[tuple[float, float]] | None:
        """Return the factors of the operands with a degree, and the degree; None if not allowed."""
        degrees = (*self.degrees, *[None] * (len(values) - len(self.degrees)))
        pairs = list(zip(values, degrees, strict=True))
        if any(d is None and not same(g, neutral) for g, d in pairs):
            return None
        defined = [(g, d) for g, d in pairs if d is not None]
        if self.alike and not all(same(g, defined[0][0]) for g, _ in defined):
            return None
        return defined


def powers(*degrees: float | None) -> Homogeneity:
    """Return a homogeneity in which each operand's factor is raised to its degree."""
    return Homogeneity(degrees)


def alike(*degrees: float | None) -> Homogeneity:
    """Return a homogeneity in which a common factor on all operands with a degree is kept."""
    return Homogeneity(degrees, alike=True)


class Cost(Enum):
    """The cost class of an operation: products, and what a compiler does not fuse into them."""

    FUSED = "fused"
    READ_WRITE = "operands and results"
    LOOK_UP = "results, read and written"
    PRODUCT = "operands and results, and two FLOPs for each place of all axes"
    ATTENTION = "operands and results, and four FLOPs for each place of all axes"
    RECURRENCE = "operands and results, and six FLOPs for each entry of the states of all places"

    @property
    def products(self) -> int:
        """How many products of matrices it is, each with two FLOPs for each place of all axes."""
        return {Cost.PRODUCT: 1, Cost.ATTENTION: 2, Cost.RECURRENCE: 3}.get(self, 0)


class Domain(Enum):
    """Where an elementwise operation is defined and finite."""

    REAL = "all numbers"
    MODERATE = "all numbers, but it overflows for large ones"
    POSITIVE = "positive numbers; of a quotient, the divisor"


class CollectiveKind(Enum):
    """The effect of a collective on a sharded value."""

    ANY = "whatever is needed, to be lowered"
    LOCAL = "nothing is sent"
    BRINGS = "brings a result to where it is used"
    EXCHANGES = "devices give parts for parts"


class RowMove(Enum):
    """What an operation moves: tokens or their gates to the slots of experts, or rows back."""

    TO_SLOTS = "to slots"
    GATES_TO_SLOTS = "gates to slots"
    TO_TOKENS = "to tokens"


class Role(Enum):
    """The role of a parameter in an operand, which determines its initial scale."""

    VALUE = "no parameter is expected here"
    MATRIX = "contracted"
    TABLE = "looked up"
    GAIN = "multiplies values, element by element"
    BIAS = "is added to values"


@dataclass(frozen=True)
class Product:
    """A size that is the product of the sizes `parts`."""

    size: Size
    parts: tuple[Size, ...]


@dataclass(frozen=True)
class Cut:
    """A size that is cut at the positions `ends`."""

    size: Size
    ends: tuple[int, ...]


SizeRule = Callable[[Definition], Product | Cut]
"""Constraints between the sizes of a node when its graph is shrunk."""

LocalRule = Callable[[Definition, "Mesh"], Attrs]
"""The attributes with which one device runs a node on its shards."""

IndexRule = Callable[[Definition], "Size"]
"""The exclusive upper bound of a node's index operand."""


@dataclass(frozen=True)
class IndexOperand:
    """An operand whose integers are indices.

    Attributes:
      operand: its position.
      below: their exclusive upper bound.
      strict: whether out-of-range integers are undefined; otherwise they select nothing.
    """

    operand: int
    below: IndexRule
    strict: bool = False
