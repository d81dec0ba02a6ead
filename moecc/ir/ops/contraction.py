"""Products of tensors, reductions and norms.

There is one product: a sum over named axes, in which every other shared axis is a batch axis.
Convolutions are sums of products over windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product as combinations
from typing import Literal, get_args

from moecc.errors import InputError
from moecc.ir.arrays import Array, Data
from moecc.ir.mesh import Space
from moecc.ir.operand import Attrs, Operand, OperationRow
from moecc.ir.operation import AxisName, AxisNames, Float, Int, Op, Word, operation
from moecc.ir.ops.rules import (
    axis_of,
    by_name,
    named_dimensions,
    need_float,
    no_ragged,
    same_dtype,
    same_size,
    summing,
)
from moecc.ir.traits import BOTH, PAIR, RESULT, Role, powers
from moecc.support.lazy import np
from moecc.terms import tensor as terms
from moecc.terms.tensor import Tensor
from moecc.terms.term import Algebra
from moecc.types import Axis, TensorType

Precision = Literal["default", "f32"]
"""In what a product is computed: the type of the run, or float32 at least."""


def contract_type(x: TensorType, w: TensorType, over: tuple[str, ...]) -> TensorType:
    """Return the type of the contraction of `x` and `w` over the axes `over`.

    Raises:
      InputError: an axis is missing from an operand, or has two sizes.
    """
    dtype = same_dtype((x, w))
    if not dtype.is_float:
        raise InputError("only floating-point operands contract", found=str(x))
    for name in over:
        same_size(axis_of(x, name, "the first operand"), axis_of(w, name, "the second operand"))
    for axis in w.axes:
        if axis.name in x:
            same_size(x[axis.name], axis)
    no_ragged(x, over, "cannot contract")
    no_ragged(w, over, "cannot contract")
    inner = [a for a in x.axes if a.name not in over]
    outer = [a for a in w.axes if a.name not in over and a.name not in x]
    return TensorType(dtype, (*inner, *outer))


_cached_contract_type = lru_cache(maxsize=1024)(contract_type)


def product(x: Array, w: Array, over: tuple[str, ...]) -> Array:
    """Return the sum of x · w over the axes `over`."""
    number = {a: i for i, a in enumerate(dict.fromkeys((*x.axes, *w.axes)))}
    axes = tuple(a for a in number if a not in over)
    numbers = ([number[a] for a in names] for names in (x.axes, w.axes, axes))
    x_numbers, w_numbers, result_numbers = numbers
    total = np.einsum(x.data, x_numbers, w.data, w_numbers, result_numbers, optimize=True)
    return Array(np.asarray(total), axes)


class ProductOp(Op):
    """A product of matrices."""

    over = AxisNames("the axes to sum over")


@operation(
    "contract",
    "x w",
    linear=(0, 1),
    residual=PAIR,
    sharding=summing("over"),
    roles=(Role.MATRIX, Role.MATRIX),
)
class ContractOp(ProductOp):
    """The sum over the named axes of x · w; other axes that both have are batch axes."""

    precision: Word[Precision] = Word(
        "f32: computed in float32 at least", "default", choices=get_args(Precision)
    )

    def infer(self, x: Operand, w: Operand) -> TensorType:
        if not self.over:
            raise InputError(
                "contract needs an axis to sum over", hint="mul multiplies without summing"
            )
        # An extent holds on to its graph, so a type that has one is not kept.
        is_open = x.type.extents or w.type.extents
        return (contract_type if is_open else _cached_contract_type)(x.type, w.type, self.over)

    def mixes(self, *operands: Operand) -> tuple[str, ...]:
        return self.over

    def meaning(self, x: Array, w: Array) -> Array:
        # Float64 is precise enough for every `precision`.
        return product(x, w, self.over)

    def term(self, algebra: Algebra, x: Tensor, w: Tensor) -> Tensor:
        return terms.contracted(x, w, self.over)


def _windows(entry: OperationRow, operands: Sequence[Operand], attrs: Attrs) -> Space:
    """Axes of one name are one dimension; windows overlap, so what they run along stays whole."""
    unsplit = frozenset((*attrs["along"], *attrs["taps"]))
    return Space(*named_dimensions(operands), summed=frozenset(attrs["over"]), unsharded=unsplit)


@operation(
    "convolve",
    "x w",
    linear=(0, 1),
    residual=PAIR,
    sharding=_windows,
    roles=(Role.MATRIX, Role.MATRIX),
)
class ConvolveOp(ProductOp):
    """The sum over the named axes, and over windows along others, of x · w.

    Windows begin every `stride` places; `padding` zeros lie before and behind each axis that
    they run along.  An element of the result is Σ x[place · stride + tap − padding] · w[tap]
    over the places `tap` of a window.
    """

    over = AxisNames("the axes of both that are summed over")
    along = AxisNames("the axes of x that windows run along")
    taps = AxisNames("the axes of w that are the places in a window, in order")
    stride = Int("the distance between windows", 1)
    padding = Int("the zeros on either side", 0)

    def infer(self, x_value: Operand, w_value: Operand) -> TensorType:
        x, w, over, along, taps = x_value.type, w_value.type, self.over, self.along, self.taps
        dtype = same_dtype((x, w))
        if not dtype.is_float:
            raise InputError("only floating-point operands are convolved", found=str(x))
        if not along or len(along) != len(taps):
            raise InputError(
                "a convolution has an axis of the weights for each axis that it runs along",
                expected=f"as many as along={along}",
                found=f"taps={taps}",
            )
        if self.stride < 1 or self.padding < 0:
            raise InputError(
                "no such windows",
                expected="a stride of at least 1",
                found=f"stride={self.stride}, padding={self.padding}",
            )
        for name in over:
            same_size(axis_of(x, name, "the first operand"), axis_of(w, name, "the second operand"))
        no_ragged(x, (*over, *along), "cannot convolve")
        no_ragged(w, w.names, "cannot convolve")
        if shared := [n for n in w.names if n in x and n not in over]:
            raise InputError(
                f"both operands have the axis {shared[0]!r}, over which nothing is summed",
                found=f"{x} and {w}",
            )
        pairs = zip(along, taps, strict=True)
        counts = {a: self._window_count(x, w, a, tap) for a, tap in pairs}
        axes = [Axis(a.name, counts[a.name]) if a.name in counts else a for a in x.axes]
        inner = [a for a in axes if a.name not in over]
        return TensorType(dtype, (*inner, *(a for a in w.axes if a.name not in (*over, *taps))))

    def _window_count(self, x: TensorType, w: TensorType, along: str, tap: str) -> int:
        size, taps = axis_of(x, along).size, axis_of(w, tap, "the weights").size
        if not isinstance(size, int) or not isinstance(taps, int):
            raise InputError(
                f"the windows along {along!r} cannot be counted",
                expected="known sizes",
                found=f"{x} and {w}",
            )
        padded = size + 2 * self.padding
        if padded < taps:
            raise InputError(
                f"a window along {along!r} is longer than the axis with its padding",
                expected=f"at most {padded}",
                found=str(taps),
            )
        return (padded - taps) // self.stride + 1

    def mixes(self, *operands: Operand) -> tuple[str, ...]:
        return (*self.over, *self.along)

    def meaning(self, x: Array, w: Array) -> Array:
        """Add, for each place of a window, the part of x that it meets times its weights."""
        along, taps = self.along, self.taps
        padded = np.pad(x.data, [(self.padding,) * 2 if n in along else (0, 0) for n in x.axes])
        counts = [w.size(tap) for tap in taps]
        last = {a: x.size(a) + 2 * self.padding - n for a, n in zip(along, counts, strict=True)}
        result = [a for a in x.axes if a not in self.over]
        result += [a for a in w.axes if a not in (*self.over, *taps)]
        number = {name: i for i, name in enumerate(dict.fromkeys((*x.axes, *w.axes)))}
        total: float | Data = 0.0
        for offsets in combinations(*map(range, counts)):
            at = dict(zip(along, offsets, strict=True))
            window = tuple(
                slice(at[n], at[n] + last[n] + 1, self.stride) if n in at else slice(None)
                for n in x.axes
            )
            tap_index = dict(zip(taps, offsets, strict=True))
            total = total + np.einsum(
                padded[window],
                [number[n] for n in x.axes],
                w.data[tuple(tap_index.get(n, slice(None)) for n in w.axes)],
                [number[n] for n in w.axes if n not in taps],
                [number[n] for n in result],
            )
        return Array(np.asarray(total), tuple(result))


class ReductionOp(Op):
    """An operation that reduces axes away."""

    axes = AxisNames("the axes")

    def infer(self, x: Operand) -> TensorType:
        need_float(x.type)
        for name in self.axes:
            axis_of(x.type, name)
        no_ragged(x.type, self.axes, "cannot reduce")
        return x.type.without(*self.axes)

    def mixes(self, *operands: Operand) -> tuple[str, ...]:
        return self.axes

    def meaning(self, x: Array) -> Array:
        data = self.reduced(x.data, x.positions(self.axes))
        return Array(np.asarray(data), tuple(a for a in x.axes if a not in self.axes))

    def reduced(self, data: Data, axes: tuple[int, ...]) -> Data:
        """Return the data without the axes at the positions `axes`."""
        raise NotImplementedError


@operation("sum", "x", linear=(0,), sharding=summing("axes"))
class SumOp(ReductionOp):
    """The sum over the named axes."""

    def reduced(self, data: Data, axes: tuple[int, ...]) -> Data:
        return np.asarray(data.sum(axes))

    def term(self, algebra: Algebra, x: Tensor) -> Tensor:
        return terms.total(x, self.axes)


@operation("mean", "x", linear=(0,), sharding=summing("axes"))
class MeanOp(ReductionOp):
    """The mean over the named axes."""

    def reduced(self, data: Data, axes: tuple[int, ...]) -> Data:
        return np.asarray(data.mean(axes))

    def term(self, algebra: Algebra, x: Tensor) -> Tensor:
        inverses = [terms.inverse_size(algebra, x.axis(name)) for name in self.axes]
        total = terms.total(x, self.axes)
        return total.with_body(algebra.multiply(total.body, *inverses))


@operation("max", "x", residual=BOTH, homogeneous=powers(1), sharding=by_name)
class MaxOp(ReductionOp):
    """The maximum over the named axes."""

    def reduced(self, data: Data, axes: tuple[int, ...]) -> Data:
        return np.asarray(data.max(axes))

    def term(self, algebra: Algebra, x: Tensor) -> Tensor:
        return terms.reduced(x, "max", self.axes)


def _finite(top: Data) -> Data:
    # −∞ − (−∞) is undefined, so any finite number is subtracted instead.
    return np.where(top == -np.inf, 0, top)


@operation("logsumexp", "x", residual=BOTH, sharding=by_name)
class LogsumexpOp(ReductionOp):
    """log Σ exp(x) over the named axes, without overflow."""

    def reduced(self, data: Data, axes: tuple[int, ...]) -> Data:
        top = _finite(data.max(axes, keepdims=True))
        total = np.log(np.exp(data - top).sum(axes, keepdims=True)) + top
        return np.asarray(total.squeeze(axes))

    def term(self, algebra: Algebra, x: Tensor) -> Tensor:
        return terms.reduced(x, "logsumexp", self.axes)


def normalised(data: Data, axis: int = -1) -> Data:
    """Return exp(data) over its sum along `axis`; zeros where all elements are −∞."""
    parts = np.exp(data - _finite(data.max(axis, keepdims=True)))
    total = parts.sum(axis, keepdims=True)
    return np.asarray(parts / np.where(total == 0, 1, total))


class AlongAxisOp(Op):
    """An operation along one axis, which it mixes."""

    axis = AxisName("the axis")

    def mixes(self, *operands: Operand) -> tuple[str, ...]:
        return (self.axis,)


@operation("softmax", "x", residual=RESULT, normalises=True, sharding=by_name)
class SoftmaxOp(AlongAxisOp):
    """exp(x) over its sum along an axis; zeros where all of it is −∞, and nothing is seen."""

    def infer(self, x: Operand) -> TensorType:
        need_float(x.type)
        axis_of(x.type, self.axis)
        no_ragged(x.type, (self.axis,), "cannot normalise")
        return x.type

    def meaning(self, x: Array) -> Array:
        return x.map(lambda d: normalised(d, x.axes.index(self.axis)))

    def term(self, algebra: Algebra, x: Tensor) -> Tensor:
        return terms.softmax(x, self.axis)


class NormOp(AlongAxisOp):
    """A norm with parameters."""

    eps = Float("added under the root", 1e-6)

    def infer(self, x_value: Operand, *vectors: Operand) -> TensorType:
        x = x_value.type
        need_float(x)
        axis = axis_of(x, self.axis)
        no_ragged(x, (axis.name,), "cannot normalise")
        same_dtype((x, *(v.type for v in vectors)))
        for vector in vectors:
            if vector.type.names != (axis.name,):
                raise InputError(
                    "a norm is scaled by a vector along its own axis",
                    expected=f"one axis {axis}",
                    found=str(vector.type),
                )
            same_size(axis, vector.type[axis.name])
        return x


@operation(
    "rms_norm",
    "x scale",
    linear=(1,),
    residual=PAIR,
    normalises=True,
    sharding=by_name,
    roles=(Role.VALUE, Role.GAIN),
)
class RmsNormOp(NormOp):
    """x / √(mean(x²) + eps) · scale (Zhang and Sennrich 2019)."""

    def meaning(self, x: Array, scale: Array) -> Array:
        mean_square = np.square(x.data).mean(x.axes.index(self.axis), keepdims=True)
        return x.map(lambda d: d / np.sqrt(mean_square + self.eps) * scale.to(x.axes))

    def term(self, algebra: Algebra, x: Tensor, scale: Tensor) -> Tensor:
        return terms.normalised(x, "rms", self.axis, self.eps, scale)


@operation(
    "layer_norm",
    "x scale bias",
    residual=PAIR,
    normalises=True,
    sharding=by_name,
    roles=(Role.VALUE, Role.GAIN, Role.BIAS),
)
class LayerNormOp(NormOp):
    """(x − mean) / √(variance + eps) · scale + bias (Ba et al. 2016)."""

    def meaning(self, x: Array, scale: Array, bias: Array) -> Array:
        at = x.axes.index(self.axis)
        centred = x.data - x.data.mean(at, keepdims=True)
        variance = np.square(centred).mean(at, keepdims=True)
        unit = centred / np.sqrt(variance + self.eps)
        return x.map(lambda _: unit * scale.to(x.axes) + bias.to(x.axes))

    def term(self, algebra: Algebra, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return terms.summed(terms.normalised(x, "layer_norm", self.axis, self.eps, scale), bias)
