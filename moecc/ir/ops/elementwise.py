"""Elementwise operations, casts, selection, and constants."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from math import isfinite, prod
from typing import Any

import numpy as np

from moecc.errors import InputError, nearest
from moecc.ir.arrays import Array, Data, meaning, together
from moecc.ir.formula import parse_formula
from moecc.ir.operand import Operand
from moecc.ir.operation import Attr, Attrs, Infer, OpDef, register
from moecc.ir.ops.rules import (
    arithmetic,
    axis_of,
    by_name,
    by_place,
    elementwise,
    float_elementwise,
    mixes_axis,
    need_kind,
    no_duplicates,
    no_ragged,
    same_dtype,
    widest,
)
from moecc.ir.traits import (
    OPERAND,
    PAIR,
    RESULT,
    Domain,
    Homogeneity,
    Residual,
    Role,
    alike,
    powers,
)
from moecc.support.untyped import JsonDict
from moecc.types import DTYPES, F32, KEY, PRED, Axis, DType, TensorType, is_lossless
from moecc.weights.arithmetic import round_to


def unary(
    name: str,
    doc: str,
    *,
    residual: Residual = OPERAND,
    homogeneous: Homogeneity | None = None,
    domain: Domain = Domain.REAL,
) -> OpDef:
    """Add a function of each element, which may stand in an expert, to the table.

    Args:
      name: what the IR prints.
      doc: what it computes.
      residual: what its derivative reads.
      homogeneous: what a factor on the operand does to the result, where anything is known.
      domain: where it is defined.
    """
    return register(
        _elementwise(
            name,
            doc,
            ("x",),
            float_elementwise,
            residual=residual,
            homogeneous=homogeneous,
            domain=domain,
        )
    )


def _elementwise(
    name: str, doc: str, operands: tuple[str, ...], infer: Infer, **traits: Any
) -> OpDef:
    """Return the row of an operation that works element by element."""
    return OpDef(name, doc, operands, infer, elementwise=True, sharding=by_name, **traits)


unary("silu", "x · sigmoid(x).")
unary("gelu", "x · Φ(x), with the error function.")
unary("gelu_tanh", "GELU by its tanh approximation (Hendrycks and Gimpel 2016).")
unary("relu", "max(x, 0).", homogeneous=powers(1))
unary("sigmoid", "1 / (1 + exp(−x)).", residual=RESULT)
unary("tanh", "The hyperbolic tangent.", residual=RESULT)
unary("exp", "The exponential.", residual=RESULT, domain=Domain.MODERATE)
unary("log", "The natural logarithm.", domain=Domain.POSITIVE)
unary("square", "x².", homogeneous=powers(2))
unary("rsqrt", "1 / √x.", residual=RESULT, homogeneous=powers(-0.5), domain=Domain.POSITIVE)
unary("normal_cdf", "Φ(x), the distribution function of a standard normal variable.")


def _infer_pointwise(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    parse_formula(attrs["function"])
    return float_elementwise(operands, attrs)


register(
    _elementwise(
        "pointwise",
        "A function of each element that has no operation of its own, as a formula of a.",
        ("x",),
        _infer_pointwise,
        attrs={"function": Attr("str", doc="the formula, `mul(a, tanh(logaddexp(a, 0.0)))`")},
        residual=OPERAND,
    )
)

register(_elementwise("neg", "−x.", ("x",), arithmetic, linear=(0,), alias=True))
register(
    _elementwise(
        "scale",
        "x times a constant.",
        ("x",),
        float_elementwise,
        attrs={"by": Attr("float", doc="the factor")},
        linear=(0,),
        alias=True,
    )
)
register(
    _elementwise(
        "stop_gradient",
        "x, through which no gradient flows.",
        ("x",),
        elementwise,
        linear=(0,),
        blocks_gradient=True,
    )
)


def _binary(name: str, doc: str, infer: Infer = arithmetic, **traits: Any) -> None:
    register(_elementwise(name, doc, ("a", "b"), infer, **traits))


_SUMMED: JsonDict = {"linear": (0, 1), "jointly": True}
_LARGER: JsonDict = {"commutative": True, "residual": PAIR, "homogeneous": alike(1, 1)}

_binary("add", "a + b.", **_SUMMED, commutative=True, roles=(Role.BIAS, Role.BIAS))
_binary("sub", "a − b.", **_SUMMED, roles=(Role.BIAS, Role.BIAS))
_binary(
    "mul",
    "a · b.",
    linear=(0, 1),
    commutative=True,
    residual=PAIR,
    roles=(Role.GAIN, Role.GAIN),
)
_binary(
    "div",
    "a / b.",
    float_elementwise,
    linear=(0,),
    residual=PAIR,
    homogeneous=powers(1, -1),
    domain=Domain.POSITIVE,
)
_binary("maximum", "The larger of a and b.", **_LARGER)
_binary("minimum", "The smaller of a and b.", **_LARGER)


def _infer_cast(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    dtype = DTYPES.get(attrs["dtype"])
    if dtype is None:
        raise InputError(
            f"unknown element type {attrs['dtype']!r}", hint=nearest(attrs["dtype"], DTYPES)
        )
    return (operands[0].type.with_dtype(dtype),)


register(
    _elementwise(
        "cast",
        "x in another element type, to nearest even; from a float to an integer, towards zero.",
        ("x",),
        _infer_cast,
        attrs={"dtype": Attr("str", doc="the element type")},
        linear=(0,),
        alias=True,
    )
)


def _infer_select(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    condition, *branches = (v.type for v in operands)
    need_kind(condition, "bool", "the condition")
    dtype = same_dtype(branches)
    return (widest([*branches, condition]).with_dtype(dtype),)


register(
    _elementwise(
        "select",
        "a where the condition holds, b elsewhere.",
        ("condition", "a", "b"),
        _infer_select,
        logical=True,
        residual=OPERAND,
        homogeneous=alike(None, 1, 1),
    )
)


def _infer_mask(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    x, keep = (v.type for v in operands)
    need_kind(keep, "bool", "the mask")
    if widest([x, keep]).names != x.names:
        raise InputError(
            "the mask has an axis that the operand lacks", expected=str(x), found=str(keep)
        )
    _check_holds(x.dtype, attrs["fill"])
    return (x,)


def _check_holds(dtype: DType, value: float) -> None:
    """Raise InputError unless `value` is an element of the type `dtype`."""
    whole = math.isfinite(value) and value == int(value)
    if dtype.is_float or (dtype.kind == "int" and whole):
        return
    raise InputError(f"{value} is not a value of the type {dtype}")


register(
    _elementwise(
        "mask",
        "x where the mask keeps it, a constant elsewhere.",
        ("x", "keep"),
        _infer_mask,
        attrs={"fill": Attr("float", float("-inf"), doc="what stands where nothing is kept")},
        logical=True,
        residual=Residual((1,)),
    )
)


def _infer_compare(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    return (elementwise(operands, attrs)[0].with_dtype(PRED),)


_binary("less", "Whether a < b.", _infer_compare, logical=True)
_binary("equal", "Whether a = b.", _infer_compare, logical=True, commutative=True)


def _infer_constant(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    dtype = DTYPES.get(attrs["dtype"])
    if dtype is None:
        raise InputError(
            f"unknown element type {attrs['dtype']!r}", hint=nearest(attrs["dtype"], DTYPES)
        )
    _check_holds(dtype, attrs["value"])
    return (TensorType(dtype),)


register(
    OpDef(
        "constant",
        "A scalar constant.",
        (),
        _infer_constant,
        attrs={
            "value": Attr("float", doc="its value"),
            "dtype": Attr("str", "f32", doc="its type"),
        },
    )
)


# Random numbers: a key is an operand, and the numbers follow from it and from the place alone.


def _need_key(type: TensorType) -> None:
    need_kind(type, "key", "the key")
    if type.axes:
        raise InputError("one key, without axes, makes the numbers", found=str(type))


def _infer_fold_key(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    _need_key(operands[0].type)
    if not 0 <= attrs["by"] < 2**32:
        raise InputError("a key is folded by a number of 32 bits", found=str(attrs["by"]))
    return (TensorType(KEY),)


register(
    OpDef(
        "fold_key",
        "Another key, made of a key and a number; keys of different numbers are independent.",
        ("key",),
        _infer_fold_key,
        results=("key",),
        attrs={"by": Attr("int", doc="the number, 0 to 2³² − 1")},
    )
)


def _infer_draw(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    key, like = (v.type for v in operands)
    _need_key(key)
    no_ragged(like, like.names, "no random numbers")
    for name in ("low", "high", "std"):
        if not isfinite(attrs.get(name, 0.0)):
            raise InputError(f"{name} must be finite", found=str(attrs[name]))
    return (like.with_dtype(like.dtype if like.dtype.is_float else F32),)


def _mixes_like(operands: Sequence[Operand], attrs: Attrs) -> tuple[str, ...]:
    # As with positions, a number belongs to its place.
    return operands[1].type.names


_COUNTED = """

        The number at a place follows from the key and the place, with the axes in alphabetical
        order: it is 23 bits of Threefry-2x32 (Salmon et al. 2011), so no backend, order of axes
        or order of computation changes it."""

register(
    OpDef(
        "random_uniform",
        "Independent numbers, uniform on [low, high), with the axes of the second operand."
        + _COUNTED,
        ("key", "like"),
        _infer_draw,
        results=("uniform",),
        attrs={
            "low": Attr("float", 0.0, doc="the least number"),
            "high": Attr("float", 1.0, doc="what they stay below"),
        },
        mixes=_mixes_like,
        sharding=by_place,
    )
)
register(
    OpDef(
        "random_normal",
        "Independent normal numbers around zero, with the axes of the second operand."
        + _COUNTED
        + """  Two uniform numbers make one normal (Box and Muller 1958).""",
        ("key", "like"),
        _infer_draw,
        results=("normal",),
        attrs={"std": Attr("float", 1.0, doc="the standard deviation")},
        mixes=_mixes_like,
        sharding=by_place,
    )
)


# Ranges written into a value at an index: the caches of keys and values that decoding keeps.


def _infer_update_slice(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    x, update, start = (v.type for v in operands)
    axis = axis_of(x, attrs["axis"])
    part = axis_of(update, attrs["axis"], "the update")
    for type in (x, update):
        no_ragged(type, (axis.name,), "cannot replace a range")
    need_kind(start, "int", "the start")
    expected = x.with_axes(part if a is axis else a for a in x.axes)
    if start.axes or x.dtype != update.dtype or set(expected.axes) != set(update.axes):
        raise InputError(
            "the update has the axes of what it is written into, and starts at one index",
            expected=f"{expected}, i32[]", found=f"{update}, {start}",
        )  # fmt: skip
    whole = isinstance(axis.size, int) and isinstance(part.size, int)
    if whole and int(str(part.size)) > int(str(axis.size)):
        raise InputError("the update is longer than the axis", found=f"{part}", expected=f"{axis}")
    return (x,)


register(
    OpDef(
        "update_slice",
        """x with a range along one axis replaced by the update, from `start` on.

        A start that would lead past the end is moved back until the update fits, and one below 0
        is 0, as XLA does.  A cache of keys and values is written so.""",
        ("x", "update", "start"),
        _infer_update_slice,
        attrs={"axis": Attr("axis", doc="the axis")},
        mixes=mixes_axis,
        linear=(0, 1),
        jointly=True,
        homogeneous=powers(None, None, None),
        sharding=by_name,
    )
)


# Regions of a program that is no graph: what a function of JAX computes between blocks.


def _infer_jax(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    dtype = DTYPES.get(attrs["dtype"])
    if dtype is None:
        raise InputError(
            f"unknown element type {attrs['dtype']!r}", hint=nearest(attrs["dtype"], DTYPES)
        )
    return (TensorType(dtype, no_duplicates(tuple(Axis(n, s) for n, s in attrs["into"]))),)


def _mixes_all(operands: Sequence[Operand], attrs: Attrs) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for v in operands for name in v.type.names))


register(
    OpDef(
        "jax",
        "A part of a function of JAX, which only the function itself can compute."
        """

        It shows what blocks depend on: where each takes its input from, and how much of the
        program is around them.  No backend runs it; counts of FLOPs and memory leave it out.""",
        ("x",),
        _infer_jax,
        attrs={
            "into": Attr("sizes", doc="the axes of the result and their sizes"),
            "dtype": Attr("str", "f32", doc="the element type of the result"),
            "equations": Attr("int", 0, doc="how many equations it has"),
            "lines": Attr("str", "", doc="its first and its last line in the program"),
        },
        results=("x",),
        mixes=_mixes_all,
        variadic=True,
        opaque=True,
    )
)


# The meaning of the elementwise operations, casts, selection, and constants.

_erfc = np.vectorize(math.erfc, otypes=[np.float64])


def logistic(x: Data) -> Data:
    """Return 1 / (1 + exp(−x))."""
    return np.asarray(1 / (1 + np.exp(-x)))


@meaning("silu")
def silu(x: Array) -> Array:
    """Return x · sigmoid(x)."""
    return x.map(lambda d: d * logistic(d))


@meaning("gelu")
def gelu(x: Array) -> Array:
    """Return x · Φ(x); by erfc, because 1 + erf loses the left tail."""
    return x.map(lambda d: d * _erfc(-d / math.sqrt(2)) / 2)


@meaning("gelu_tanh")
def gelu_tanh(x: Array) -> Array:
    """Return x / 2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))) (Hendrycks and Gimpel 2016)."""
    root = math.sqrt(2 / math.pi)
    return x.map(lambda d: d / 2 * (1 + np.tanh(root * (d + 0.044715 * d**3))))


@meaning("relu")
def relu(x: Array) -> Array:
    """Return max(x, 0)."""
    return x.map(lambda d: np.maximum(d, 0))


@meaning("sigmoid")
def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(−x))."""
    return x.map(logistic)


@meaning("tanh")
def tanh(x: Array) -> Array:
    """Return the hyperbolic tangent."""
    return x.map(np.tanh)


@meaning("exp")
def exp(x: Array) -> Array:
    """Return the exponential."""
    return x.map(np.exp)


@meaning("log")
def log(x: Array) -> Array:
    """Return the natural logarithm."""
    return x.map(np.log)


@meaning("square")
def square(x: Array) -> Array:
    """Return x²."""
    return x.map(np.square)


@meaning("rsqrt")
def rsqrt(x: Array) -> Array:
    """Return 1 / √x."""
    return x.map(lambda d: 1 / np.sqrt(d))


@meaning("normal_cdf")
def normal_cdf(x: Array) -> Array:
    """Return Φ(x), by erfc, which keeps the left tail."""
    return x.map(lambda d: _erfc(-d / math.sqrt(2)) / 2)


_erf = np.vectorize(math.erf, otypes=[np.float64])

FORMULAS: dict[str, Callable[..., Data]] = {
    "neg": np.negative,
    "abs": np.abs,
    "sign": np.sign,
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "log": np.log,
    "log1p": np.log1p,
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "asin": np.arcsin,
    "acos": np.arccos,
    "atan": np.arctan,
    "sinh": np.sinh,
    "cosh": np.cosh,
    "tanh": np.tanh,
    "asinh": np.arcsinh,
    "acosh": np.arccosh,
    "atanh": np.arctanh,
    "sigmoid": logistic,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "cbrt": np.cbrt,
    "square": np.square,
    "erf": _erf,
    "erfc": _erfc,
    "floor": np.floor,
    "ceil": np.ceil,
    "round": np.round,
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "stop_gradient": lambda x: x,
    "wide": lambda x: x,
    "narrow": lambda x: x,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "pow": np.power,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "atan2": np.arctan2,
    "logaddexp": np.logaddexp,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "less": np.less,
    "less_equal": np.less_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
    "not": np.logical_not,
    "where": np.where,
}
"""What the names of formulas mean, on numbers of double precision."""


@meaning("pointwise")
def pointwise(x: Array, *, function: str) -> Array:
    """Return a formula of each element."""
    formula = parse_formula(function)
    return x.map(lambda d: np.asarray(formula.evaluate(FORMULAS, d)))


@meaning("neg")
def neg(x: Array) -> Array:
    """Return −x."""
    return x.map(np.negative)


@meaning("scale")
def scale(x: Array, *, by: float) -> Array:
    """Return x times a constant."""
    return x.map(lambda d: d * by)


@meaning("stop_gradient")
def stop_gradient(x: Array) -> Array:
    """Return x: the interpreter computes no gradients."""
    return x


@meaning("add")
def add(a: Array, b: Array) -> Array:
    """Return a + b."""
    axes, (x, y) = together(a, b)
    return Array(x + y, axes)


@meaning("sub")
def sub(a: Array, b: Array) -> Array:
    """Return a − b."""
    axes, (x, y) = together(a, b)
    return Array(x - y, axes)


@meaning("mul")
def mul(a: Array, b: Array) -> Array:
    """Return a · b."""
    axes, (x, y) = together(a, b)
    return Array(x * y, axes)


@meaning("div")
def div(a: Array, b: Array) -> Array:
    """Return a / b."""
    axes, (x, y) = together(a, b)
    return Array(x / y, axes)


@meaning("maximum")
def maximum(a: Array, b: Array) -> Array:
    """Return the larger of a and b."""
    axes, (x, y) = together(a, b)
    return Array(np.maximum(x, y), axes)


@meaning("minimum")
def minimum(a: Array, b: Array) -> Array:
    """Return the smaller of a and b."""
    axes, (x, y) = together(a, b)
    return Array(np.minimum(x, y), axes)


@meaning("less")
def less(a: Array, b: Array) -> Array:
    """Return whether a < b."""
    axes, (x, y) = together(a, b)
    return Array(np.asarray(x < y), axes)


@meaning("equal")
def equal(a: Array, b: Array) -> Array:
    """Return whether a = b."""
    axes, (x, y) = together(a, b)
    return Array(np.asarray(x == y), axes)


@meaning("select")
def select(condition: Array, a: Array, b: Array) -> Array:
    """Return a where the condition holds, b elsewhere."""
    axes, (x, y, where) = together(a, b, condition)
    return Array(np.where(where, x, y), axes)


@meaning("mask")
def mask(x: Array, keep: Array, *, fill: float) -> Array:
    """Return x where the mask keeps it, `fill` elsewhere."""
    filler = x.data.dtype.type(fill)
    return x.map(lambda d: np.where(keep.to(x.axes), d, filler))


@meaning("constant")
def constant(*, value: float, dtype: str) -> Array:
    """Return a scalar, as exact as the attribute."""
    return Array(stored(np.asarray(value), DTYPES[dtype]), ())


@meaning("cast")
def cast(x: Array, *, dtype: str) -> Array:
    """Return x in another element type."""
    return x.map(lambda d: rounded(d, x.dtype, DTYPES[dtype]))


def rounded(data: Data, old: DType | None, new: DType) -> Data:
    """Return `data`, declared as `old`, rounded to `new` and widened to the computed type.

    The interpreter does not round to the declared types, so a lossless cast is the
    identity: otherwise dropping a cast from f32 to f32 would change the result.
    """
    if old is not None and is_lossless(old, new):
        return data
    if new.is_float:
        return stored(round_to(data.astype(np.float64), new), new)
    # A float becomes an integer towards zero, as in NumPy, JAX and torch.
    return stored(data.astype(new.numpy), new)


def stored(data: Data, dtype: DType) -> Data:
    """Return `data` in the interpreter's representation of the type `dtype`."""
    if dtype.name in ("u64", "key"):
        return data.astype(np.uint64)
    return data.astype({"float": np.float64, "int": np.int64, "bool": np.bool_}[dtype.kind])


# The meaning of random numbers: counter-based Threefry-2x32, the same in every backend.

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry(key: int, counts: Data) -> Data:
    """Return 64 bits for each count, by Threefry-2x32 in 20 rounds (Salmon et al. 2011).

    Args:
      key: 64 bits.
      counts: 64-bit counts, of any shape.
    """
    keys = [np.uint32(key >> 32), np.uint32(key & 0xFFFFFFFF)]
    keys.append(keys[0] ^ keys[1] ^ np.uint32(_PARITY))
    counts = np.atleast_1d(counts).astype(np.uint64)
    a = (counts >> np.uint64(32)).astype(np.uint32) + keys[0]
    b = (counts & np.uint64(0xFFFFFFFF)).astype(np.uint32) + keys[1]
    for turn in range(5):
        for by in _ROTATIONS[turn % 2]:
            a = a + b
            b = ((b << np.uint32(by)) | (b >> np.uint32(32 - by))) ^ a
        a = a + keys[(turn + 1) % 3]
        b = b + keys[(turn + 2) % 3] + np.uint32(turn + 1)
    return (a.astype(np.uint64) << np.uint64(32)) | b.astype(np.uint64)


def folded(key: int, by: int) -> int:
    """Return another key, derived from `key` and the number `by`."""
    return int(threefry(key, np.asarray(by))[0])


def uniform(key: int, shape: tuple[int, ...]) -> Data:
    """Return numbers on [0, 1) with 23 bits, one for each element in row-major order."""
    words = threefry(key, np.arange(prod(shape)))
    bits = (words >> np.uint64(32)) ^ (words & np.uint64(0xFFFFFFFF))
    return np.asarray((bits >> np.uint64(9)).astype(np.float64) / 2**23).reshape(shape)


def _places(like: Array) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the axes of `like` in alphabetical order, and their sizes."""
    axes = tuple(sorted(like.axes))
    return axes, tuple(like.size(a) for a in axes)


@meaning("fold_key")
def fold_key(key: Array, *, by: int) -> Array:
    """Return another key, derived from a key and a number."""
    return Array(np.asarray(folded(int(key.data), by), np.uint64), ())


@meaning("random_uniform")
def random_uniform(key: Array, like: Array, *, low: float, high: float) -> Array:
    """Return independent uniform numbers with the axes of `like`."""
    axes, shape = _places(like)
    numbers = low + uniform(int(key.data), shape) * (high - low)
    return Array(Array(numbers, axes).to(like.axes), like.axes)


@meaning("random_normal")
def random_normal(key: Array, like: Array, *, std: float) -> Array:
    """Return independent normal numbers with the axes of `like` (Box and Muller 1958)."""
    axes, shape = _places(like)
    first, second = (uniform(folded(int(key.data), by), shape) for by in (0, 1))
    numbers = std * np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * math.pi * second)
    return Array(Array(numbers, axes).to(like.axes), like.axes)


# Regions of functions of JAX: what they mean is in the function, and not here.


@meaning("jax")
def region(
    *operands: Array,
    into: tuple[tuple[str, int | str], ...],
    dtype: str,
    equations: int,
    lines: str,
) -> Array:
    """Raise InputError: only the function can compute it."""
    raise InputError(
        "a region of JAX is computed by its function alone",
        where=lines or None,
        hint="moe(function) of `moecc.jax` runs the blocks in it",
    )


# The meaning of writing a range into a value.


@meaning("update_slice")
def update_slice(x: Array, update: Array, start: Array, *, axis: str) -> Array:
    """Return x with the range of the axis from `start` on replaced, moved to where it fits."""
    size, most = update.size(axis), x.size(axis) - update.size(axis)
    first = min(max(int(start.data), 0), most)
    made = np.moveaxis(x.data.copy(), x.axes.index(axis), 0)
    rest = [a for a in x.axes if a != axis]
    made[first : first + size] = update.to((axis, *rest))
    return Array(np.moveaxis(made, 0, x.axes.index(axis)), x.axes)
