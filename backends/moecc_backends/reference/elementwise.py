"""The meaning of the elementwise operations, casts, selection, and constants."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from moecc.ir.formula import parse_formula
from moecc.types import DTYPES, DType, is_lossless
from moecc.weights.arithmetic import round_to
from moecc_backends.reference.arrays import Array, Data, meaning, together

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
