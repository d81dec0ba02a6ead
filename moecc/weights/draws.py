"""Random expressions, addressed by key and element index.

Element number i of a draw, counted in the order of the draw's own axes, depends on the key and on
i alone: Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) yields
the 64-bit word number i of the stream with that key.  So slicing, renaming, chunking and
threads never change a byte.  Keys are fixed when the expression is created.
"""

from __future__ import annotations

import hashlib

from moecc.types.dtypes import F32
from moecc.types.tensor import TensorType
from moecc.weights.expr import Expr, axis_of, check_finite, check_type, node, size

LARGEST = 3.4e38
"""The largest number that is drawn, as f32 has it."""

FARTHEST = 8.3
"""How many standard deviations a normal number of 52 random bits can be from its mean."""

KEY_BITS = 128


def derive_key(seed: int, location: str) -> int:
    """Return the key of a draw: 128 bits of the SHA-256 of the seed and of its location."""
    text = f"moecc draw\0{seed}\0{location}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[: KEY_BITS // 8], "big")


class Draw(Expr):
    """Base of the random expressions.

    Attributes:
      key: the stream of random words.
    """

    key: int

    @property
    def _key_text(self) -> str:
        return f"key={self.key:#x}"

    def _check_draw(self, type: TensorType, largest: float) -> TensorType:
        check_type(self, type)
        if type.dtype is not F32:
            raise self.error("numbers are drawn in f32", found=str(type), hint="cast the draw")
        if largest > LARGEST:
            expected = f"numbers up to {LARGEST:.3g}"
            raise self.error("numbers too large for f32", expected=expected, found=f"{largest:.3g}")
        return self._check_key(type)

    def _check_key(self, type: TensorType) -> TensorType:
        if not 0 <= self.key < 1 << KEY_BITS:
            raise self.error(f"a key is a number of {KEY_BITS} bits", found=hex(self.key))
        return type

    def _normalise(self) -> None:
        for name in ("std", "mean", "bound", "low", "high"):
            if hasattr(self, name):
                self._set(name, float(getattr(self, name)))


@node
class Normal(Draw):
    """Normal numbers with a mean and a standard deviation."""

    op = "normal"
    type: TensorType
    std: float
    key: int
    mean: float = 0.0

    def _infer(self) -> TensorType:
        check_finite(self, "the mean", self.mean)
        _check_spread(self, self.std)
        return self._check_draw(self.type, abs(self.mean) + FARTHEST * self.std)

    def __str__(self) -> str:
        mean = "" if self.mean.hex() == "0x0.0p+0" else f", mean={self.mean!r}"
        return f"normal({self.type}, std={self.std!r}{mean}, {self._key_text})"


@node
class TruncatedNormal(Draw):
    """Normal numbers with mean 0 truncated to `bound` standard deviations; `std` is untruncated.

    Drawn by inversion: nothing is rejected, so an element's index still determines its value.
    """

    op = "truncated_normal"
    type: TensorType
    std: float
    key: int
    bound: float = 3.0

    def _infer(self) -> TensorType:
        _check_spread(self, self.std)
        if not 0.0 < self.bound <= 8.0:
            what = "the bound is out of range"
            raise self.error(what, expected="0 < bound <= 8", found=str(self.bound))
        return self._check_draw(self.type, self.bound * self.std)

    def __str__(self) -> str:
        bound = "" if self.bound == 3.0 else f", bound={self.bound!r}"
        return f"truncated_normal({self.type}, std={self.std!r}{bound}, {self._key_text})"


@node
class Uniform(Draw):
    """Numbers uniform on [low, high)."""

    op = "uniform"
    type: TensorType
    low: float
    high: float
    key: int

    def _infer(self) -> TensorType:
        check_finite(self, "the lower bound", self.low)
        check_finite(self, "the upper bound", self.high)
        if self.low > self.high:
            raise self.error("the lower bound is not below the upper one")
        check_finite(self, "the range", self.high - self.low)
        return self._check_draw(self.type, max(abs(self.low), abs(self.high)))

    def __str__(self) -> str:
        return f"uniform({self.type}, low={self.low!r}, high={self.high!r}, {self._key_text})"


@node
class Subset(Draw):
    """A random subset of `count` positions of `axis` for each position of the other axes.

    The positions with the smallest random words are chosen.

    Attributes:
      type: of element type ``pred``.
      axis: the axis whose positions are chosen.
      count: how many are chosen.
    """

    op = "subset"
    type: TensorType
    axis: str
    count: int
    key: int

    def _infer(self) -> TensorType:
        check_type(self, self.type)
        if self.type.dtype.kind != "bool":
            raise self.error("a subset is of type pred", found=str(self.type))
        axis_of(self, self, self.axis)
        if not 0 <= self.count <= size(self.type[self.axis]):
            raise self.error(
                "the number of positions is out of range",
                expected=f"0 to {size(self.type[self.axis])}",
                found=str(self.count),
            )
        return self._check_key(self.type)

    def __str__(self) -> str:
        return f"subset({self.type}, axis={self.axis}, count={self.count}, {self._key_text})"


def _check_spread(expr: Expr, std: float) -> None:
    check_finite(expr, "the standard deviation", std)
    if std < 0.0:
        raise expr.error("a standard deviation must not be negative", found=str(std))
