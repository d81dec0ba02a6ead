"""Random expressions, addressed by key and element index.

Element number i of a draw, counted in the order of the draw's own axes, depends on the key and on
i alone: Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) yields
the 64-bit word number i of the stream with that key.  So slicing, renaming, chunking and
threads never change a byte.  Keys are fixed when the expression is created.
"""

from __future__ import annotations

import hashlib
from decimal import Context, Decimal
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any, TypeAlias

from moecc.support.lazy import np
from moecc.types import F32, Doubles, TensorType
from moecc.weights.expr import Expr, axis_of, check_finite, check_type, node

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


@node
class Normal(Draw):
    """Normal numbers with a mean and a standard deviation."""

    syntax = "normal({type}, std={std}[, mean={mean}], key={key:key})"
    type: TensorType
    std: float
    key: int
    mean: float = 0.0

    def _infer(self) -> TensorType:
        check_finite(self, "the mean", self.mean)
        _check_spread(self, self.std)
        return self._check_draw(self.type, abs(self.mean) + FARTHEST * self.std)


@node
class TruncatedNormal(Draw):
    """Normal numbers with mean 0 truncated to `bound` standard deviations; `std` is untruncated.

    Drawn by inversion: nothing is rejected, so an element's index still determines its value.
    """

    syntax = "truncated_normal({type}, std={std}[, bound={bound}], key={key:key})"
    type: TensorType
    std: float
    key: int
    bound: float = 3.0

    def _infer(self) -> TensorType:
        _check_spread(self, self.std)
        if not 0.0 < self.bound <= 8.0:
            message = "the bound is out of range"
            raise self.error(message, expected="0 < bound <= 8", found=str(self.bound))
        return self._check_draw(self.type, self.bound * self.std)


@node
class Uniform(Draw):
    """Numbers uniform on [low, high)."""

    syntax = "uniform({type}, low={low}, high={high}, key={key:key})"
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


@node
class Subset(Draw):
    """A random subset of `count` positions of `axis` for each position of the other axes.

    The positions with the smallest random words are chosen.

    Attributes:
      type: of element type ``pred``.
      axis: the axis whose positions are chosen.
      count: how many are chosen.
    """

    syntax = "subset({type}, axis={axis}, count={count}, key={key:key})"
    type: TensorType
    axis: str
    count: int
    key: int

    def _infer(self) -> TensorType:
        check_type(self, self.type)
        if self.type.dtype.kind != "bool":
            raise self.error("a subset is of type pred", found=str(self.type))
        axis_of(self, self, self.axis)
        if not 0 <= self.count <= self.type[self.axis].fixed_size:
            raise self.error(
                "the number of positions is out of range",
                expected=f"0 to {self.type[self.axis].fixed_size}",
                found=str(self.count),
            )
        return self._check_key(self.type)


def _check_spread(expr: Expr, std: float) -> None:
    check_finite(expr, "the standard deviation", std)
    if std < 0.0:
        raise expr.error("a standard deviation must not be negative", found=str(std))


# Random words addressed by index, and the numbers computed from them.
#
# Only additions, products, quotients, square roots and shifts are used, each of which IEEE 754
# rounds uniquely, so that every platform draws the same bytes; logarithms and error functions of
# the C library do not guarantee that.

Words: TypeAlias = "np.ndarray[Any, np.dtype[np.uint64]]"
Singles: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"
Box = tuple[tuple[int, int], ...]
"""A range [start, stop) for each axis."""

_WORDS_PER_COUNTER = 4
_BLOCK = 1 << 17
"""How many numbers are computed at a time: intermediates should stay in the cache, and threads
should not contend for the interpreter lock too often."""

_MAX_WASTE = 4


def stream(key: int, start: int, count: int) -> Words:
    """Return words [start, start + count) of the stream of `key`, ``u64[count]``.

    Philox4x64-10 gives four words for each value of its counter.
    """
    counter, skip = divmod(start, _WORDS_PER_COUNTER)
    generator = np.random.Philox(key=key, counter=counter)
    words: Words = generator.random_raw(skip + count)[skip:]
    return words


def box_words(key: int, sizes: tuple[int, ...], box: Box) -> Words:
    """Return the words of the elements in `box` of a draw with axes of `sizes`."""
    extents = [stop - start for start, stop in box]
    if not prod(extents):
        return np.empty(extents, np.uint64)
    complete = _first_whole(sizes, box)
    inner = max(0, complete - 1)
    if prod(extents[:inner]) > 1 and prod(sizes[inner:]) <= _MAX_WASTE * prod(extents[inner:]):
        # One long run is faster than many short ones, although some of its words are unused.
        rows = box_words(key, sizes, (*box[:inner], *((0, n) for n in sizes[inner:])))
        return rows[(slice(None),) * inner + tuple(slice(*ends) for ends in box[inner:])]
    if prod(extents[:inner]) == 1:
        return stream(key, _flat(sizes, [s for s, _ in box]), prod(extents)).reshape(extents)
    words = np.empty(extents, np.uint64)
    for position in product(*(range(start, stop) for start, stop in box[:inner])):
        first = _flat(sizes, [*position, *(start for start, _ in box[inner:])])
        row = tuple(at - start for at, (start, _) in zip(position, box, strict=False))
        words[row] = stream(key, first, prod(extents[inner:])).reshape(extents[inner:])
    return words


def _first_whole(sizes: tuple[int, ...], box: Box) -> int:
    """Return the first axis from which on `box` covers all positions."""
    at = len(sizes)
    while at and box[at - 1] == (0, sizes[at - 1]):
        at -= 1
    return at


def _flat(sizes: tuple[int, ...], element: list[int]) -> int:
    """Return the row-major index of the element at `element`, as an exact integer."""
    flat = 0
    for length, position in zip(sizes, element, strict=True):
        flat = flat * length + position
    return flat


def uniform(words: Words, low: float, high: float) -> Singles:
    """Return numbers uniform on [low, high), of the same shape."""
    return _blockwise(words, lambda w: low + (high - low) * ((w >> np.uint64(11)) * 2.0**-53))


def normal(words: Words, mean: float, std: float) -> Singles:
    """Return normal numbers, of the same shape, by inversion of the distribution function."""
    return _blockwise(words, lambda w: mean + std * normal_quantile(open_unit(w)))


def truncated_normal(words: Words, std: float, bound: float) -> Singles:
    """Return normal numbers of mean 0 within `bound` standard deviations, of the same shape."""
    low = tail(bound)

    def draw(w: Words) -> Doubles:
        z = normal_quantile(low + (1.0 - 2.0 * low) * open_unit(w))
        z.clip(-bound, bound, out=z)
        z *= std
        return z

    return _blockwise(words, draw)


def open_unit(words: Words) -> Doubles:
    """Return numbers uniform on the open interval (0, 1)."""
    # With 53 bits the largest would round to 1.
    return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def _blockwise(words: Words, draw: Any) -> Singles:
    flat = np.ascontiguousarray(words).reshape(-1)
    numbers = np.empty(flat.shape, np.float32)
    for at in range(0, flat.size, _BLOCK):
        numbers[at : at + _BLOCK] = draw(flat[at : at + _BLOCK])
    return numbers.reshape(words.shape)


# Rational approximations of the normal quantile: Wichura, "Algorithm AS 241", Applied Statistics
# 37(3), 1988, function PPND16; relative error about 1e-16.  Highest power first.
_CENTRE = (
    (2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4,
     4.5921953931549871457e4, 1.3731693765509461125e4, 1.9715909503065514427e3,
     1.3314166789178437745e2, 3.3871328727963666080e0),
    (5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4,
     2.1213794301586595867e4, 5.3941960214247511077e3, 6.8718700749205790830e2,
     4.2313330701600911252e1, 1.0),
)  # fmt: skip
_NEAR_TAIL = (
    (7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1,
     1.27045825245236838258e0, 3.64784832476320460504e0, 5.76949722146069140550e0,
     4.63033784615654529590e0, 1.42343711074968357734e0),
    (1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2,
     1.48103976427480074590e-1, 6.89767334985100004550e-1, 1.67638483018380384940e0,
     2.05319162663775882187e0, 1.0),
)  # fmt: skip
_FAR_TAIL = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.24266094738807843860e-3,
     2.65321895265761230930e-2, 2.96560571828504891230e-1, 1.78482653991729133580e0,
     5.46378491116411436990e0, 6.65790464350110377720e0),
    (2.04426310338993978564e-15, 1.42151175831644588870e-7, 1.84631831751005468180e-5,
     7.86869131145613259100e-4, 1.48753612908506148525e-2, 1.36929880922735805310e-1,
     5.99832206555887937690e-1, 1.0),
)  # fmt: skip


def normal_quantile(p: Doubles) -> Doubles:
    """Return the normal quantile of probabilities within (0, 1), ``f64[n]``."""
    q = p - 0.5
    z: Doubles = q * _ratio(_CENTRE, 0.180625 - q * q)
    tails = np.flatnonzero(np.abs(q) > 0.425)
    if tails.size:
        r = np.sqrt(-_log(np.minimum(p[tails], 1.0 - p[tails])))
        far = _ratio(_FAR_TAIL, r - 5.0)
        z[tails] = np.copysign(np.where(r <= 5.0, _ratio(_NEAR_TAIL, r - 1.6), far), q[tails])
    return z


def _ratio(coefficients: tuple[tuple[float, ...], tuple[float, ...]], x: Doubles) -> Doubles:
    over, under = (_polynomial(c, x) for c in coefficients)
    over /= under
    return over


def _polynomial(coefficients: tuple[float, ...], x: Doubles) -> Doubles:
    value = x * coefficients[0]
    for c in coefficients[1:-1]:
        value += c
        value *= x
    value += coefficients[-1]
    return value


_LN2 = 0.6931471805599453
_ATANH = tuple(2.0 / (2 * k + 1) for k in reversed(range(12)))


def _log(x: Doubles) -> Doubles:
    """Return natural logarithms, to about 1e-16, using only exactly rounded operations."""
    mantissa, exponent = np.frexp(x)
    low = mantissa < 0.7071067811865476
    mantissa = np.where(low, mantissa * 2.0, mantissa)
    exponent = exponent - low
    # log m = 2 atanh f, with |f| <= 0.172, so that twelve terms reach the last bit.
    f = (mantissa - 1.0) / (mantissa + 1.0)
    return exponent * _LN2 + f * _polynomial(_ATANH, f * f)


@lru_cache
def tail(bound: float) -> float:
    """Return the probability that a normal number is below -`bound`, for bounds up to 8."""
    context = Context(prec=60)
    b = Decimal(bound)
    term = total = b
    n = 0
    # The Taylor series of the distribution function at 0: sum of (-1)^n b^(2n+1) / (n! 2^n (2n+1)).
    while abs(term) > Decimal("1e-50"):
        n += 1
        term = context.divide(context.multiply(term, context.multiply(b, -b)), Decimal(2 * n))
        total = context.add(total, context.divide(term, Decimal(2 * n + 1)))
    pi = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
    root = context.sqrt(context.multiply(2, pi))
    return float(context.subtract(Decimal("0.5"), context.divide(total, root)))
