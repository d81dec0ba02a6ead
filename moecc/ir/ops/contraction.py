"""The one product of tensors: a sum over named axes, every other shared axis a batch axis."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product as _convolution_product

import numpy as np

from moecc.errors import InputError
from moecc.ir.arrays import Array, Data, meaning
from moecc.ir.operand import Entry, Operand
from moecc.ir.operation import Attr, Attrs, OpDef, register
from moecc.ir.ops.rules import (
    axis_of,
    by_name,
    mixes_axis,
    named_dimensions,
    need_float,
    no_ragged,
    same_dtype,
    same_size,
    summing,
)
from moecc.ir.sharding_rules import Space
from moecc.ir.traits import BOTH, NOTHING, PAIR, RESULT, Homogeneity, Residual, Role, powers
from moecc.support.untyped import JsonDict
from moecc.types import Axis, TensorType


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
        mine = x.by_name.get(axis.name)
        if mine is not None:
            same_size(mine, axis)
    no_ragged(x, over, "cannot contract")
    no_ragged(w, over, "cannot contract")
    rest = [a for a in x.axes if a.name not in over]
    more = [a for a in w.axes if a.name not in over and a.name not in x]
    return TensorType(dtype, (*rest, *more))


_cached = lru_cache(maxsize=1024)(contract_type)


def _infer(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    x, w = (v.type for v in operands)
    over: tuple[str, ...] = attrs["over"]
    if not over:
        raise InputError(
            "contract needs an axis to sum over", hint="mul multiplies without summing"
        )
    # An extent holds on to its graph, so a type that has one is not kept.
    if x.extents or w.extents:
        return (contract_type(x, w, over),)
    return (_cached(x, w, over),)


register(
    OpDef(
        "contract",
        "The sum over the named axes of x · w; other axes that both have are batch axes.",
        ("x", "w"),
        _infer,
        attrs={
            "over": Attr("axes", doc="the axes to sum over"),
            "precision": Attr(
                "str", "default", ("default", "f32"), doc="f32: computed in float32 at least"
            ),
        },
        mixes=lambda _operands, attrs: tuple(attrs["over"]),
        linear=(0, 1),
        residual=PAIR,
        sharding=summing("over"),
        roles=(Role.MATRIX, Role.MATRIX),
    )
)


# Convolutions: windows of a value along named axes, each multiplied with the same weights.


def _infer_convolve(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    x, w = (v.type for v in operands)
    dtype = same_dtype((x, w))
    over, along, taps = attrs["over"], attrs["along"], attrs["taps"]
    if not dtype.is_float:
        raise InputError("only floating-point operands are convolved", found=str(x))
    if not along or len(along) != len(taps):
        raise InputError(
            "a convolution has an axis of the weights for each axis that it runs along",
            expected=f"as many as along={along}",
            found=f"taps={taps}",
        )
    if attrs["stride"] < 1 or attrs["padding"] < 0:
        found = f"stride={attrs['stride']}, padding={attrs['padding']}"
        raise InputError("no such windows", expected="a stride of at least 1", found=found)
    for name in over:
        same_size(axis_of(x, name, "the first operand"), axis_of(w, name, "the second operand"))
    no_ragged(x, (*over, *along), "cannot convolve")
    no_ragged(w, w.names, "cannot convolve")
    if shared := [n for n in w.names if n in x and n not in over]:
        raise InputError(
            f"both operands have the axis {shared[0]!r}, over which nothing is summed",
            found=f"{x} and {w}",
        )
    places = dict(zip(along, (_places(x, w, a, t, attrs) for a, t in _pairs(attrs)), strict=True))
    kept = (Axis(a.name, places[a.name]) if a.name in places else a for a in x.axes)
    rest = [a for a in kept if a.name not in over]
    more = [a for a in w.axes if a.name not in (*over, *taps)]
    return (TensorType(dtype, (*rest, *more)),)


def _pairs(attrs: Attrs) -> list[tuple[str, str]]:
    return list(zip(attrs["along"], attrs["taps"], strict=True))


def _places(x: TensorType, w: TensorType, along: str, tap: str, attrs: Attrs) -> int:
    """Return the number of windows along an axis."""
    size, taps = axis_of(x, along).size, axis_of(w, tap, "the weights").size
    if not isinstance(size, int) or not isinstance(taps, int):
        what = f"the windows along {along!r} cannot be counted"
        raise InputError(what, expected="known sizes", found=f"{x} and {w}")
    room: int = size + 2 * attrs["padding"] - taps
    if room < 0:
        what = f"a window along {along!r} is longer than the axis with its padding"
        raise InputError(what, expected=f"at most {size + 2 * attrs['padding']}", found=str(taps))
    return room // int(attrs["stride"]) + 1


def _mixed(_operands: Sequence[Operand], attrs: Attrs) -> tuple[str, ...]:
    return (*attrs["over"], *attrs["along"])


def _windows(entry: Entry, operands: Sequence[Operand], attrs: Attrs) -> Space:
    """Axes of one name are one dimension; windows overlap, so what they run along stays whole."""
    whole = frozenset((*attrs["along"], *attrs["taps"]))
    return Space(*named_dimensions(operands), summed=frozenset(attrs["over"]), whole=whole)


register(
    OpDef(
        "convolve",
        """The sum over the named axes, and over windows along others, of x · w.

        Windows begin every `stride` places; `padding` zeros lie before and behind each axis that
        they run along.  An element of the result is Σ x[place · stride + tap − padding] · w[tap]
        over the places `tap` of a window.""",
        ("x", "w"),
        _infer_convolve,
        attrs={
            "over": Attr("axes", doc="the axes of both that are summed over"),
            "along": Attr("axes", doc="the axes of x that windows run along"),
            "taps": Attr("axes", doc="the axes of w that are the places in a window, in order"),
            "stride": Attr("int", 1, doc="the distance between windows"),
            "padding": Attr("int", 0, doc="the zeros on either side"),
        },
        mixes=_mixed,
        linear=(0, 1),
        residual=PAIR,
        sharding=_windows,
        roles=(Role.MATRIX, Role.MATRIX),
    )
)


# Reductions and normalisations.


def _infer_reduce(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    type = operands[0].type
    need_float(type)
    for name in attrs["axes"]:
        axis_of(type, name)
    no_ragged(type, attrs["axes"], "cannot reduce")
    return (type.without(*attrs["axes"]),)


def _mixes_axes(operands: Sequence[Operand], attrs: Attrs) -> tuple[str, ...]:
    return tuple(attrs["axes"])


def _reduction(
    name: str,
    doc: str,
    *,
    linear: tuple[int, ...] = (),
    residual: Residual = NOTHING,
    homogeneous: Homogeneity | None = None,
) -> None:
    """Add a reduction to the table; one that is linear is a sum, which may lie unreduced."""
    register(
        OpDef(
            name,
            doc,
            ("x",),
            _infer_reduce,
            attrs={"axes": Attr("axes", doc="the axes")},
            mixes=_mixes_axes,
            linear=linear,
            residual=residual,
            homogeneous=homogeneous,
            sharding=summing("axes") if linear else by_name,
        )
    )


_reduction("sum", "The sum over the named axes.", linear=(0,))
_reduction("mean", "The mean over the named axes.", linear=(0,))
_reduction("max", "The maximum over the named axes.", residual=BOTH, homogeneous=powers(1))
_reduction("logsumexp", "log Σ exp(x) over the named axes, without overflow.", residual=BOTH)


def _infer_softmax(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    type = operands[0].type
    need_float(type)
    axis_of(type, attrs["axis"])
    no_ragged(type, (attrs["axis"],), "cannot normalise")
    return (type,)


register(
    OpDef(
        "softmax",
        "exp(x) over its sum along an axis; zeros where all of it is −∞, and nothing is seen.",
        ("x",),
        _infer_softmax,
        attrs={"axis": Attr("axis", doc="the axis")},
        mixes=mixes_axis,
        residual=RESULT,
        normalises=True,
        sharding=by_name,
    )
)


def _infer_norm(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    x, *vectors = (v.type for v in operands)
    need_float(x)
    axis = axis_of(x, attrs["axis"])
    no_ragged(x, (axis.name,), "cannot normalise")
    same_dtype((x, *vectors))
    for vector in vectors:
        if vector.names != (axis.name,):
            raise InputError(
                "a norm is scaled by a vector along its own axis",
                expected=f"one axis {axis}",
                found=str(vector),
            )
        same_size(axis, vector[axis.name])
    return (x,)


_NORM = {
    "axis": Attr("axis", doc="the axis"),
    "eps": Attr("float", 1e-6, doc="added under the root"),
}
_ROWS: JsonDict = {
    "residual": PAIR,
    "normalises": True,
    "sharding": by_name,
}

register(
    OpDef(
        "rms_norm",
        "x / √(mean(x²) + eps) · scale (Zhang and Sennrich 2019).",
        ("x", "scale"),
        _infer_norm,
        attrs=_NORM,
        mixes=mixes_axis,
        linear=(1,),
        **_ROWS,
        roles=(Role.VALUE, Role.GAIN),
    )
)
register(
    OpDef(
        "layer_norm",
        "(x − mean) / √(variance + eps) · scale + bias (Ba et al. 2016).",
        ("x", "scale", "bias"),
        _infer_norm,
        attrs=_NORM,
        mixes=mixes_axis,
        **_ROWS,
        roles=(Role.VALUE, Role.GAIN, Role.BIAS),
    )
)


# The meaning of the one product of tensors.


@meaning("contract")
def contract(x: Array, w: Array, *, over: tuple[str, ...], precision: str) -> Array:
    """Sum x · w over the axes `over`; every other shared axis is a batch axis.

    The reference computes in float64, which is precise enough for every `precision`.
    """
    return product(x, w, over)


def product(x: Array, w: Array, over: tuple[str, ...]) -> Array:
    """Return the sum of x · w over the axes `over`."""
    result = [a for a in dict.fromkeys((*x.axes, *w.axes)) if a not in over]
    number = {a: i for i, a in enumerate(dict.fromkeys((*x.axes, *w.axes)))}
    summed = np.einsum(
        x.data,
        [number[a] for a in x.axes],
        w.data,
        [number[a] for a in w.axes],
        [number[a] for a in result],
        optimize=True,
    )
    return Array(np.asarray(summed), tuple(result))


# The meaning of convolutions.

Names = tuple[str, ...]


@meaning("convolve")
def convolve(
    x: Array, w: Array, *, over: Names, along: Names, taps: Names, stride: int, padding: int
) -> Array:
    """Sum over the places of a window what x has there, times the weights of that place."""
    margins = [(padding, padding) if name in along else (0, 0) for name in x.axes]
    padded = np.pad(x.data, margins)
    counts = {tap: w.size(tap) for tap in taps}
    last = {a: x.size(a) + 2 * padding - counts[t] for a, t in zip(along, taps, strict=True)}
    result = [a for a in x.axes if a not in over]
    result += [a for a in w.axes if a not in (*over, *taps)]
    number = {name: i for i, name in enumerate(dict.fromkeys((*x.axes, *w.axes)))}
    total: float | np.ndarray = 0.0
    for place in _convolution_product(*(range(counts[tap]) for tap in taps)):
        at = dict(zip(along, place, strict=True))
        seen = tuple(
            slice(at[n], at[n] + last[n] + 1, stride) if n in at else slice(None) for n in x.axes
        )
        chosen = dict(zip(taps, place, strict=True))
        weights = w.data[tuple(chosen.get(n, slice(None)) for n in w.axes)]
        total = total + np.einsum(
            padded[seen],
            [number[n] for n in x.axes],
            weights,
            [number[n] for n in w.axes if n not in taps],
            [number[n] for n in result],
        )
    return Array(np.asarray(total), tuple(result))


# The meaning of reductions and normalisations.


def _reduced(x: Array, axes: tuple[str, ...], data: Data) -> Array:
    return Array(np.asarray(data), tuple(a for a in x.axes if a not in axes))


@meaning("sum")
def sum_(x: Array, *, axes: tuple[str, ...]) -> Array:
    """Return the sum over the axes."""
    return _reduced(x, axes, x.data.sum(x.positions(axes)))


@meaning("mean")
def mean(x: Array, *, axes: tuple[str, ...]) -> Array:
    """Return the mean over the axes."""
    return _reduced(x, axes, x.data.mean(x.positions(axes)))


@meaning("max")
def max_(x: Array, *, axes: tuple[str, ...]) -> Array:
    """Return the maximum over the axes."""
    return _reduced(x, axes, x.data.max(x.positions(axes)))


@meaning("logsumexp")
def logsumexp(x: Array, *, axes: tuple[str, ...]) -> Array:
    """Return log Σ exp(x) over the axes; −∞ where all are −∞."""
    top = _finite(x.data.max(x.positions(axes), keepdims=True))
    total = np.log(np.exp(x.data - top).sum(x.positions(axes), keepdims=True)) + top
    return _reduced(x, axes, total.squeeze(x.positions(axes)))


def normalised(data: Data, axis: int = -1) -> Data:
    """Return exp(data) over its sum along `axis`; zeros where all elements are −∞."""
    parts = np.exp(data - _finite(data.max(axis, keepdims=True)))
    total = parts.sum(axis, keepdims=True)
    return np.asarray(parts / np.where(total == 0, 1, total))


def _finite(top: Data) -> Data:
    # −∞ − (−∞) is undefined, so shift by any finite number instead.
    return np.where(top == -np.inf, 0, top)


@meaning("softmax")
def softmax(x: Array, *, axis: str) -> Array:
    """Return exp(x) over its sum along the axis; zeros where all elements are −∞ (masked)."""
    return x.map(lambda d: normalised(d, x.axes.index(axis)))


@meaning("rms_norm")
def rms_norm(x: Array, scale: Array, *, axis: str, eps: float) -> Array:
    """Return x / √(mean(x²) + eps) · scale (Zhang and Sennrich 2019)."""
    mean_square = np.square(x.data).mean(x.axes.index(axis), keepdims=True)
    return x.map(lambda d: d / np.sqrt(mean_square + eps) * scale.to(x.axes))


@meaning("layer_norm")
def layer_norm(x: Array, scale: Array, bias: Array, *, axis: str, eps: float) -> Array:
    """Return (x − mean) / √(variance + eps) · scale + bias (Ba et al. 2016)."""
    at = x.axes.index(axis)
    centred = x.data - x.data.mean(at, keepdims=True)
    variance = np.square(centred).mean(at, keepdims=True)
    unit = centred / np.sqrt(variance + eps)
    return x.map(lambda _: unit * scale.to(x.axes) + bias.to(x.axes))
