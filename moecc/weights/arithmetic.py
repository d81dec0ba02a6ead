"""Arithmetic weight expressions.

Arithmetic is done in float32, in float64 where an operand is f64, and its result has that type;
a `Cast`, or the requested output type, rounds once, to nearest, ties to even.  The
axes of one operand contain those of the others, which are broadcast by name.
"""

from __future__ import annotations

from typing import Literal

from moecc.types.dtypes import F32, DType
from moecc.types.tensor import TensorType
from moecc.weights.expr import Expr, axis_of, check_finite, computed, listed, node

F32_MAX = (2.0 - 2.0**-23) * 2.0**127


@node
class Scale(Expr):
    """A product with a number, which is first rounded to the type of the arithmetic."""

    op = "scale"
    x: Expr
    factor: float

    def _normalise(self) -> None:
        self._set("factor", float(self.factor))

    def _infer(self) -> TensorType:
        dtype = computed(self, self.x)
        check_finite(self, "the factor", self.factor)
        if dtype is F32 and abs(self.factor) > F32_MAX:
            raise self.error("f32 does not hold the factor", found=str(self.factor))
        return self.x.type.with_dtype(dtype)

    def __str__(self) -> str:
        return f"scale({self.x}, {self.factor!r})"


@node
class Cast(Expr):
    """The nearest values of another float type; finite values that become infinite are an error."""

    op = "cast"
    x: Expr
    dtype: DType

    def _infer(self) -> TensorType:
        if self.dtype is not self.x.type.dtype:
            computed(self, self.x)
            if not self.dtype.is_float:
                raise self.error("floats are cast to floats", found=str(self.dtype))
        return self.x.type.with_dtype(self.dtype)

    def __str__(self) -> str:
        return f"cast({self.x}, {self.dtype})"


@node
class Add(Expr):
    """A sum, element by element."""

    op = "add"
    a: Expr
    b: Expr

    def _infer(self) -> TensorType:
        return contained(self, self.a, self.b).with_dtype(computed(self, self.a, self.b))

    def __str__(self) -> str:
        return f"add({listed(self.operands)})"


@node
class Mul(Expr):
    """A product, element by element."""

    op = "mul"
    a: Expr
    b: Expr

    def _infer(self) -> TensorType:
        return contained(self, self.a, self.b).with_dtype(computed(self, self.a, self.b))

    def __str__(self) -> str:
        return f"mul({listed(self.operands)})"


@node
class Minimum(Expr):
    """The smaller of two, element by element."""

    op = "minimum"
    a: Expr
    b: Expr

    def _infer(self) -> TensorType:
        return contained(self, self.a, self.b).with_dtype(computed(self, self.a, self.b))

    def __str__(self) -> str:
        return f"minimum({listed(self.operands)})"


@node
class Select(Expr):
    """The first choice where the mask holds, the second elsewhere.

    Choices of the same element type keep it bit for bit; otherwise both become that of arithmetic.
    """

    op = "select"
    mask: Expr
    a: Expr
    b: Expr

    def _infer(self) -> TensorType:
        check_mask(self, self.mask)
        type = contained(self, self.a, self.b, self.mask)
        same = self.a.type.dtype is self.b.type.dtype
        return type.with_dtype(self.a.type.dtype if same else computed(self, self.a, self.b))

    def __str__(self) -> str:
        return f"select({listed(self.operands)})"


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

    op = "moment"
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
        kept = self.x.type.with_axes(a for a in self.x.type.axes if a.name in self.keep)
        return kept.with_dtype(computed(self, self.x))

    def __str__(self) -> str:
        mask = f", {self.mask}" if self.mask is not None else ""
        keep = f", keep=({', '.join(self.keep)})" if self.keep else ""
        return f"{self.kind}({self.x}{mask}{keep})"


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
