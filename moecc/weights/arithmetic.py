"""Arithmetic weight expressions.

Arithmetic is done in float32, in float64 where an operand is f64, and its result has that type;
a `Cast`, or the requested output type, rounds once, to nearest, ties to even.  The
axes of one operand contain those of the others, which are broadcast by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, reduce
from math import gcd
from typing import Any, Literal

from moecc.support.lazy import np
from moecc.terms import tensor as terms
from moecc.terms.tensor import Tensor
from moecc.terms.term import Algebra
from moecc.types import BF16, F16, F32, F64, Array, DType, TensorType, is_lossless
from moecc.weights.expr import Expr, Full, Source, axis_of, check_finite, node, transform
from moecc.weights.expr import computed_dtype as computed

F32_MAX = (2.0 - 2.0**-23) * 2.0**127


@node
class Scale(Expr):
    """A product with a number, which is first rounded to the type of the arithmetic."""

    syntax = "scale({x}, {factor})"
    x: Expr
    factor: float

    def _infer(self) -> TensorType:
        dtype = computed(self, self.x)
        check_finite(self, "the factor", self.factor)
        if dtype is F32 and abs(self.factor) > F32_MAX:
            raise self.error("f32 does not hold the factor", found=str(self.factor))
        return self.x.type.with_dtype(dtype)

    def _term(self, algebra: Algebra, *operands: Tensor) -> Tensor:
        factor = self.factor if algebra.fractions else rounded(self.factor, self.type.dtype)
        return terms.scaled(operands[0], factor)


@node
class Cast(Expr):
    """The nearest values of another float type; finite values that become infinite are an error."""

    syntax = "cast({x}, {dtype})"
    x: Expr
    dtype: DType

    def _infer(self) -> TensorType:
        if self.dtype is not self.x.type.dtype:
            computed(self, self.x)
            if not self.dtype.is_float:
                raise self.error("floats are cast to floats", found=str(self.dtype))
        return self.x.type.with_dtype(self.dtype)

    def _term(self, algebra: Algebra, *operands: Tensor) -> Tensor:
        """Return x where the type holds its elements, and an unknown rounding elsewhere."""
        if is_lossless(self.x.type.dtype, self.dtype):
            return operands[0]
        return terms.pointwise("cast", (str(self.x.type.dtype), str(self.dtype)), operands)


def scaled(weight: Expr, factor: float) -> Expr:
    """Return `weight` times `factor`."""
    return weight if factor == 1 else Scale(weight, factor)


@dataclass(frozen=True, eq=False, repr=False)
class Binary(Expr):
    """An operation on two operands, element by element, as the function `ufunc` of NumPy."""

    ufunc = ""
    a: Expr
    b: Expr

    def _infer(self) -> TensorType:
        return contained(self, self.a, self.b).with_dtype(computed(self, self.a, self.b))

    def compute(self, a: Array, b: Array, out: Array | None = None) -> Array:
        """Return the result, in `out` if given, for arrays of the type of the arithmetic."""
        return np.asarray(getattr(np, self.ufunc)(a, b, out=out))


@node
class Add(Binary):
    """A sum, element by element."""

    syntax, ufunc = "add({a}, {b})", "add"

    def _term(self, algebra: Algebra, *operands: Tensor) -> Tensor:
        return terms.summed(*operands)


@node
class Mul(Binary):
    """A product, element by element."""

    syntax, ufunc = "mul({a}, {b})", "multiply"

    def _term(self, algebra: Algebra, *operands: Tensor) -> Tensor:
        return terms.multiplied(*operands)


@node
class Minimum(Binary):
    """The smaller of two, element by element."""

    syntax, ufunc = "minimum({a}, {b})", "minimum"

    def _term(self, algebra: Algebra, *operands: Tensor) -> Tensor:
        return terms.symmetric("minimum", *operands)


@node
class Select(Expr):
    """The first choice where the mask holds, the second elsewhere.

    Choices of the same element type keep it bit for bit; otherwise both become that of arithmetic.
    """

    syntax = "select({mask}, {a}, {b})"
    mask: Expr
    a: Expr
    b: Expr

    def _infer(self) -> TensorType:
        check_mask(self, self.mask)
        type = contained(self, self.a, self.b, self.mask)
        same = self.a.type.dtype is self.b.type.dtype
        return type.with_dtype(self.a.type.dtype if same else computed(self, self.a, self.b))

    def _term(self, algebra: Algebra, *operands: Tensor) -> Tensor:
        return terms.chosen(*operands)


@node
class Moment(Expr):
    """The mean or the standard deviation over all axes but `keep`; NumPy's, with divisor n.

    Computed in float64, by a fixed tree of additions, then rounded to the type of the arithmetic.
    Where the mask selects nothing, both are 0.

    Attributes:
      kind: ``mean`` or ``std``.
      x: the expression whose moment it is.
      mask: the elements that count; its axes are among those of `x`.
      keep: the axes that are kept; the result has them in the order of `x`.
    """

    syntax = "{kind}({x}[, {mask}][, keep={keep}])"
    kind: Literal["mean", "std"]
    x: Expr
    mask: Expr | None = None
    keep: tuple[str, ...] = ()

    def _normalise(self) -> None:
        order = {name: at for at, name in enumerate(self.x.type.names)}
        self._set("keep", tuple(sorted(self.keep, key=lambda n: order.get(n, -1))))

    def _infer(self) -> TensorType:
        if self.kind not in ("mean", "std"):
            raise self.error("no such moment", expected="mean or std", found=repr(self.kind))
        if len(set(self.keep)) != len(self.keep):
            raise self.error("an axis is kept twice", found=", ".join(self.keep))
        for name in self.keep:
            axis_of(self, self.x, name)
        if self.mask is not None:
            check_mask(self, self.mask)
            _check_contained(self, self.x.type, self.mask.type)
        type = self.x.type.with_axes(a for a in self.x.type.axes if a.name in self.keep)
        return type.with_dtype(computed(self, self.x))


def check_mask(expr: Expr, mask: Expr) -> None:
    """Check that `mask` can be the mask of `expr`. Raises: InputError."""
    if mask.type.dtype.kind != "bool":
        raise expr.error("a mask is of type pred", found=str(mask.type))


def contained(expr: Expr, *operands: Expr) -> TensorType:
    """Return the type whose axes contain those of all operands; the first of the largest.

    Raises:
      InputError: no operand's axes contain the others', or sizes differ.
    """
    largest = max((x.type for x in operands), key=lambda t: t.rank)
    for x in operands:
        _check_contained(expr, largest, x.type)
    return largest


def _check_contained(expr: Expr, large: TensorType, small: TensorType) -> None:
    for axis in small.axes:
        if axis.name not in large:
            raise expr.error(
                "the axes of one operand must contain those of the others",
                expected=f"axes among {', '.join(large.names) or 'none'}",
                found=str(small),
                hint=f"tile the other operand over {axis.name!r}",
            )
        if large[axis.name] != axis:
            raise expr.error(
                f"the operands disagree on the size of axis {axis.name!r}",
                expected=str(large),
                found=str(small),
            )


# Conversion between float types: exact where possible, else rounded once, ties to even.


@cache
def _exponent_bits() -> dict[np.dtype[Any], Any]:
    """Return by float type the bits of its exponent, as an integer of its width."""
    return {
        BF16.numpy: np.uint16(0x7F80),
        F16.numpy: np.uint16(0x7C00),
        F32.numpy: np.uint32(0x7F80_0000),
        F64.numpy: np.uint64(0x7FF0 << 48),
    }


_BLOCK = 1 << 16


def widen(values: Array, dtype: DType, out: Array | None = None) -> Array:
    """Return `values`, floats, in `dtype`, f32 or f64, without loss; always a copy, in `out`."""
    result = np.empty(values.shape, dtype.numpy) if out is None else out
    if values.dtype == BF16.numpy and dtype is F32:
        # The bits of a bf16 are the upper half of those of the f32.
        np.left_shift(values.view(np.uint16), 16, out=result.view(np.uint32), dtype=np.uint32)
    else:
        with np.errstate(invalid="ignore"):  # a signalling NaN
            result[...] = values
    return result


def round_to(values: Array, dtype: DType) -> Array:
    """Return floats rounded to `dtype`, to nearest, ties to even; infinite where they overflow."""
    if values.dtype == dtype.numpy:
        return values
    if values.dtype == np.float64 and dtype not in (F32, F16):
        values = _round_to_odd(values)
    elif values.dtype.itemsize < 4:
        values = widen(values, F32)
    if dtype is BF16:
        return _to_bf16(values)
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(dtype.numpy, copy=False)


def _to_bf16(values: Array) -> Array:
    """Round f32 to bf16; a NaN becomes the positive quiet one, whatever its sign and payload."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = values.astype(BF16.numpy)
    if first_nonfinite(rounded) is not None:
        rounded[np.isnan(values)] = np.nan
    return rounded


def _round_to_odd(values: Array) -> Array:
    """Return f64 as f32, setting the last bit if inexact, so that rounding again is correct.

    Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", IEEE Transactions on
    Computers 57(4), 2008.
    """
    with np.errstate(over="ignore", under="ignore"):
        near = values.astype(np.float32)
    bits = np.atleast_1d(near).view(np.uint32)
    back, wanted = np.atleast_1d(near.astype(np.float64)), np.atleast_1d(values)
    even = (back != wanted) & (bits & np.uint32(1) == 0) & np.isfinite(wanted)
    above = np.abs(back) > np.abs(wanted)
    bits = np.where(even & above, bits - np.uint32(1), np.where(even, bits + np.uint32(1), bits))
    return bits.view(np.float32).reshape(values.shape)


def first_nonfinite(values: Array) -> int | None:
    """Return the row-major index of the first NaN or infinity of an array, or None.

    Element types without NaN and infinity have none.
    """
    if values.dtype.kind in "iub" or not values.size:
        return None
    flat = np.ascontiguousarray(values).reshape(-1)
    exponent = _exponent_bits().get(flat.dtype)
    if exponent is None:
        return _first(~np.isfinite(flat))
    bits = flat.view(exponent.dtype)
    sign = exponent.dtype.type(1 << (8 * exponent.dtype.itemsize - 1))
    signed = np.dtype(f"i{exponent.dtype.itemsize}")
    # Without the sign bit, a NaN or an infinity is at least the all-ones exponent: as a signed
    # number where it is positive, and where it is negative as an unsigned one.
    for at in range(0, bits.size, _BLOCK):
        block = bits[at : at + _BLOCK]
        if block.view(signed).max() >= exponent or block.max() >= exponent | sign:
            return at + int(np.argmax(block & ~sign >= exponent))
    return None


def _first(bad: Array) -> int | None:
    at = int(np.argmax(bad))
    return at if bad[at] else None


# Constant tensors: their numbers as stored, and computed with as the evaluator does.


def value_of(full: Full) -> float:
    """Return the number that a constant tensor holds, rounded to its element type."""
    return float(_array(full))


def rounded(number: float, dtype: DType) -> float:
    """Return `number` rounded to a type of arithmetic, f32 or f64; infinite where it overflows."""
    with np.errstate(over="ignore"):
        return float(dtype.numpy.type(number))


def compute_constant(e: Scale | Cast | Binary, operands: Sequence[Full]) -> float:
    """Return the value of an operation on constant tensors; not finite where it overflows."""
    with np.errstate(all="ignore"):
        return float(_computed(e, [_array(x) for x in operands]))


def _array(full: Full) -> Array:
    return round_to(np.array(full.value), full.type.dtype)


def _computed(e: Scale | Cast | Binary, values: list[Array]) -> Array:
    if isinstance(e, Cast):
        return round_to(values[0], e.dtype)
    wide = [widen(v, e.type.dtype) for v in values]
    if isinstance(e, Binary):
        return e.compute(wide[0], wide[1])
    return np.asarray(wide[0] * wide[0].dtype.type(e.factor))


# Weights of several models of one architecture: a base, and branches with names.
#
# The tensors of the base have their own names, and those of a branch its name before theirs, so
# that an expression over the base becomes one over a branch by renaming its sources.

BASE = "base"
"""The name of the model itself among the branches."""

STATISTICS = "capture"
"""The name of statistics of the model among the models that weights are read from."""

_SEPARATOR = ":"


def name_in(branch: str, tensor: str) -> str:
    """Return the name of a tensor of `branch` among those of all."""
    return tensor if branch == BASE else f"{branch}{_SEPARATOR}{tensor}"


def branch_and_name(name: str) -> tuple[str, str]:
    """Return the branch and the tensor that `name_in` made a name of."""
    branch, separator, tensor = name.partition(_SEPARATOR)
    return (branch, tensor) if separator else (BASE, name)


def is_statistic(name: str) -> bool:
    """Return whether a tensor is a statistic of a model's values, and no weight."""
    return branch_and_name(name)[0] == STATISTICS


def read_from(weight: Expr, branch: str) -> Expr:
    """Return `weight`, over tensors of the base, read from those of `branch`."""

    def renamed(node: Expr) -> Expr:
        # Statistics have a name before theirs already, and are those of the base.
        if not isinstance(node, Source) or _SEPARATOR in node.name:
            return node
        return Source(name_in(branch, node.name), node.type)

    return weight if branch == BASE else transform(weight, renamed)


def mean_over(weight: Expr, branches: Sequence[str]) -> Expr:
    """Return the mean of `weight` over several branches, each as often as it is listed."""
    read = [read_from(weight, branch) for branch in _once(branches)]
    if len(set(read)) == 1:
        return read[0]
    return Scale(reduce(Add, read), 1 / len(read))


def _once(branches: Sequence[str]) -> list[str]:
    """Return the branches, each as few times as keeps their shares: of ``a, b, a, b`` one each."""
    counts = Counter(branches)
    least = gcd(*counts.values())
    return [name for name, count in counts.items() for _ in range(count // least)]
