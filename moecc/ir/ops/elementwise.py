"""Elementwise operations, casts, selection, and constants."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from moecc.errors import InputError, nearest
from moecc.ir.arrays import Array, Data, stored, together
from moecc.ir.formula import parse_formula
from moecc.ir.operand import Attrs, Operand
from moecc.ir.operation import Float, Infer, Op, OpDef, TermMeaning, Word, operation, register
from moecc.ir.ops.rules import (
    arithmetic,
    by_name,
    elementwise,
    float_elementwise,
    need_kind,
    same_dtype,
    widest,
)
from moecc.ir.traits import (
    OPERAND,
    PAIR,
    RESULT,
    Domain,
    Residual,
    Role,
    alike,
    powers,
)
from moecc.support.lazy import np
from moecc.terms import tensor as terms
from moecc.terms.tensor import Tensor
from moecc.terms.term import Algebra, Head
from moecc.types import DTYPES, PRED, DType, TensorType, is_lossless
from moecc.weights.arithmetic import round_to

Function = Callable[..., Data]
"""Elements of the result from those of the operands."""


def _numpy(name: str) -> Function:
    # Looked up when called, so that the table does not import NumPy.
    return lambda *operands: np.asarray(getattr(np, name)(*operands))


def _by_element(function: Callable[[float], float]) -> Function:
    return lambda x: np.vectorize(function, otypes=[np.float64])(x)


_erf, _erfc = _by_element(math.erf), _by_element(math.erfc)


def logistic(x: Data) -> Data:
    """Return 1 / (1 + exp(−x))."""
    return np.asarray(1 / (1 + np.exp(-x)))


def _normal_cdf(x: Data) -> Data:
    # By erfc, because 1 + erf loses the left tail.
    return np.asarray(_erfc(-x / math.sqrt(2)) / 2)


def _gelu_tanh(x: Data) -> Data:
    return np.asarray(x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


FORMULAS: dict[str, Function] = {
    "neg": _numpy("negative"),
    "abs": _numpy("abs"),
    "sign": _numpy("sign"),
    "exp": _numpy("exp"),
    "exp2": _numpy("exp2"),
    "expm1": _numpy("expm1"),
    "log": _numpy("log"),
    "log1p": _numpy("log1p"),
    "sin": _numpy("sin"),
    "cos": _numpy("cos"),
    "tan": _numpy("tan"),
    "asin": _numpy("arcsin"),
    "acos": _numpy("arccos"),
    "atan": _numpy("arctan"),
    "sinh": _numpy("sinh"),
    "cosh": _numpy("cosh"),
    "tanh": _numpy("tanh"),
    "asinh": _numpy("arcsinh"),
    "acosh": _numpy("arccosh"),
    "atanh": _numpy("arctanh"),
    "sigmoid": logistic,
    "sqrt": _numpy("sqrt"),
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "cbrt": _numpy("cbrt"),
    "square": _numpy("square"),
    "erf": _erf,
    "erfc": _erfc,
    "floor": _numpy("floor"),
    "ceil": _numpy("ceil"),
    "round": _numpy("round"),
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "stop_gradient": lambda x: x,
    "wide": lambda x: x,
    "narrow": lambda x: x,
    "add": _numpy("add"),
    "sub": _numpy("subtract"),
    "mul": _numpy("multiply"),
    "div": _numpy("divide"),
    "pow": _numpy("power"),
    "maximum": _numpy("maximum"),
    "minimum": _numpy("minimum"),
    "atan2": _numpy("arctan2"),
    "logaddexp": _numpy("logaddexp"),
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "less": _numpy("less"),
    "less_equal": _numpy("less_equal"),
    "greater": _numpy("greater"),
    "greater_equal": _numpy("greater_equal"),
    "equal": _numpy("equal"),
    "not_equal": _numpy("not_equal"),
    "and": _numpy("logical_and"),
    "or": _numpy("logical_or"),
    "xor": _numpy("logical_xor"),
    "not": _numpy("logical_not"),
    "where": _numpy("where"),
}
"""What the names of formulas mean, on numbers of double precision."""


def _difference(a: Tensor, b: Tensor) -> Tensor:
    return terms.summed(a, terms.scaled(b, -1))


def _less(a: Tensor, b: Tensor) -> Tensor:
    """[a < b]; of integers, [b − a − 1 ≥ 0]."""
    if a.dtype is None or b.dtype is None or {a.dtype.kind, b.dtype.kind} != {"int"}:
        return terms.pointwise("holds", ("less",), (a, b))
    algebra = a.algebra
    gap = algebra.add(_difference(b, a).body, algebra.number(-1))
    return Tensor(algebra, terms.joint_axes((a, b)), algebra.apply(Head("at_least_0"), (), [gap]))


def _equal(a: Tensor, b: Tensor) -> Tensor:
    """[a = b]; of integers, [a − b = 0]."""
    if a.dtype is None or b.dtype is None or {a.dtype.kind, b.dtype.kind} != {"int"}:
        return terms.pointwise("holds", ("equal",), (a, b))
    gap = _difference(a, b)
    return gap.with_body(a.algebra.apply(Head("equal"), (), [gap.body]))


TERMS: dict[str, Callable[..., Tensor]] = {
    "add": terms.summed,
    "sub": _difference,
    "mul": terms.multiplied,
    "div": terms.divided,
    "log": lambda x: terms.of_positive("log", x),
    "rsqrt": lambda x: terms.of_positive("rsqrt", x),
    "neg": lambda x: terms.scaled(x, -1),
    "maximum": lambda a, b: terms.symmetric("maximum", a, b),
    "minimum": lambda a, b: terms.symmetric("minimum", a, b),
    "less": _less,
    "equal": _equal,
}
"""What names of operations mean in index notation; others are uninterpreted functions."""


def _term_of(notation: Callable[..., Tensor]) -> TermMeaning:
    return lambda _algebra, tensors, _attrs: notation(*tensors)


def _elementwise(
    name: str,
    doc: str,
    operands: tuple[str, ...],
    infer: Infer,
    function: Function | None,
    traits: dict[str, Any],
) -> OpDef:
    """Register an operation without attributes that works element by element."""
    compute = function or FORMULAS[name]
    notation = TERMS.get(name)
    traits = traits if notation is None else traits | {"term": _term_of(notation)}

    def meaning(arrays: Sequence[Array], attrs: Attrs) -> Array:
        axes, data = together(*arrays)
        return Array(np.asarray(compute(*data)), axes)

    return register(
        OpDef(name, doc, operands, infer, meaning, elementwise=True, sharding=by_name, **traits)
    )


def unary(name: str, doc: str, function: Function | None = None, **traits: Any) -> OpDef:
    """Add a function of each element, which may stand in an expert, to the table.

    Args:
      name: the name in the text format.
      doc: what it computes.
      function: its meaning on float64; by default that of the formula of this name.
      traits: further columns of the row; by default the derivative reads the operand.
    """
    traits = {"residual": OPERAND} | traits
    return _elementwise(name, doc, ("x",), float_elementwise, function, traits)


def binary(name: str, doc: str, infer: Infer = arithmetic, **traits: Any) -> OpDef:
    """Add a function of two elements, which the formula of this name computes, to the table."""
    return _elementwise(name, doc, ("a", "b"), infer, None, traits)


def _infer_compare(operands: Sequence[Operand], attrs: Attrs) -> TensorType:
    return elementwise(operands, attrs).with_dtype(PRED)


_SUMMED: dict[str, Any] = {"linear": (0, 1), "jointly": True, "roles": (Role.BIAS, Role.BIAS)}
_SCALED: dict[str, Any] = {"linear": (0, 1), "residual": PAIR, "roles": (Role.GAIN, Role.GAIN)}
_CHOSEN: dict[str, Any] = {"commutative": True, "residual": PAIR, "homogeneous": alike(1, 1)}
_QUOTIENT: dict[str, Any] = {"linear": (0,), "residual": PAIR, "homogeneous": powers(1, -1)}
_RECIPROCAL: dict[str, Any] = {"residual": RESULT, "homogeneous": powers(-0.5)}

unary("silu", "x · sigmoid(x).", lambda x: x * logistic(x))
unary("gelu", "x · Φ(x), with the error function.", lambda x: x * _normal_cdf(x))
unary("gelu_tanh", "GELU by its tanh approximation (Hendrycks and Gimpel 2016).", _gelu_tanh)
unary("relu", "max(x, 0).", homogeneous=powers(1))
unary("sigmoid", "1 / (1 + exp(−x)).", residual=RESULT)
unary("tanh", "The hyperbolic tangent.", residual=RESULT)
unary("exp", "The exponential.", residual=RESULT, domain=Domain.MODERATE)
unary("log", "The natural logarithm.", domain=Domain.POSITIVE)
unary("square", "x².", homogeneous=powers(2))
unary("rsqrt", "1 / √x.", domain=Domain.POSITIVE, **_RECIPROCAL)
unary("normal_cdf", "Φ(x), the distribution function of a standard normal variable.", _normal_cdf)
binary("add", "a + b.", commutative=True, **_SUMMED)
binary("sub", "a − b.", **_SUMMED)
binary("mul", "a · b.", commutative=True, **_SCALED)
binary("div", "a / b.", float_elementwise, domain=Domain.POSITIVE, **_QUOTIENT)
binary("maximum", "The larger of a and b.", **_CHOSEN)
binary("minimum", "The smaller of a and b.", **_CHOSEN)
binary("less", "Whether a < b.", _infer_compare, logical=True)
binary("equal", "Whether a = b.", _infer_compare, logical=True, commutative=True)
_elementwise("neg", "−x.", ("x",), arithmetic, None, {"linear": (0,), "alias": True})
_elementwise(
    "stop_gradient",
    "x, through which no gradient flows.",
    ("x",),
    elementwise,
    None,
    {"linear": (0,), "blocks_gradient": True},
)


@operation("pointwise", "x", elementwise=True, sharding=by_name, residual=OPERAND)
class PointwiseOp(Op):
    """A function of each element that has no operation of its own, as a formula of a."""

    function: Word[str] = Word("the formula, `mul(a, tanh(logaddexp(a, 0.0)))`")

    def infer(self, x: Operand) -> TensorType:
        parse_formula(self.function)
        return float_elementwise((x,), self.attrs)

    def meaning(self, x: Array) -> Array:
        formula = parse_formula(self.function)
        return x.map(lambda d: np.asarray(formula.evaluate(FORMULAS, d)))


@operation("scale", "x", elementwise=True, sharding=by_name, linear=(0,), alias=True)
class ScaleOp(Op):
    """x times a constant."""

    by = Float("the factor")

    def infer(self, x: Operand) -> TensorType:
        return float_elementwise((x,), self.attrs)

    def meaning(self, x: Array) -> Array:
        return x.map(lambda d: d * self.by)

    def term(self, algebra: Algebra, x: Tensor) -> Tensor:
        if not math.isfinite(self.by):
            return terms.pointwise("scale", (self.by,), (replace(x, finite=False),))
        return terms.scaled(x, self.by)


def dtype_of(name: str) -> DType:
    """Return the element type `name`. Raises: InputError where there is none."""
    if name not in DTYPES:
        raise InputError(f"unknown element type {name!r}", hint=nearest(name, DTYPES))
    return DTYPES[name]


@operation("cast", "x", elementwise=True, sharding=by_name, linear=(0,), alias=True)
class CastOp(Op):
    """x in another element type, to nearest even; from a float to an integer, towards zero."""

    dtype: Word[str] = Word("the element type")

    def infer(self, x: Operand) -> TensorType:
        return x.type.with_dtype(dtype_of(self.dtype))

    def meaning(self, x: Array) -> Array:
        return x.map(lambda d: rounded(d, x.dtype, DTYPES[self.dtype]))

    def term(self, algebra: Algebra, x: Tensor) -> Tensor:
        """Return x where the type holds its elements, and an unknown rounding elsewhere."""
        dtype = DTYPES[self.dtype]
        if x.dtype is not None and is_lossless(x.dtype, dtype):
            return x
        return terms.pointwise("cast", (str(x.dtype), self.dtype), (x,))


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


@operation(
    "select",
    "condition a b",
    elementwise=True,
    sharding=by_name,
    logical=True,
    residual=OPERAND,
    homogeneous=alike(None, 1, 1),
)
class SelectOp(Op):
    """a where the condition holds, b elsewhere."""

    def infer(self, condition: Operand, a: Operand, b: Operand) -> TensorType:
        need_kind(condition.type, "bool", "the condition")
        dtype = same_dtype((a.type, b.type))
        return widest((a.type, b.type, condition.type)).with_dtype(dtype)

    def meaning(self, condition: Array, a: Array, b: Array) -> Array:
        axes, (x, y, where) = together(a, b, condition)
        return Array(np.where(where, x, y), axes)

    def term(self, algebra: Algebra, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return terms.chosen(condition, a, b)


def _check_holds(dtype: DType, value: float) -> None:
    """Raise InputError unless `value` is an element of the type `dtype`."""
    is_integral = math.isfinite(value) and value == int(value)
    if not dtype.is_float and not (dtype.kind == "int" and is_integral):
        raise InputError(f"{value} is not a value of the type {dtype}")


@operation(
    "mask", "x keep", elementwise=True, sharding=by_name, logical=True, residual=Residual((1,))
)
class MaskOp(Op):
    """x where the mask keeps it, a constant elsewhere."""

    fill = Float("what stands where nothing is kept", float("-inf"))

    def infer(self, x: Operand, keep: Operand) -> TensorType:
        need_kind(keep.type, "bool", "the mask")
        if widest([x.type, keep.type]).names != x.type.names:
            raise InputError(
                "the mask has an axis that the operand lacks",
                expected=str(x.type),
                found=str(keep.type),
            )
        _check_holds(x.type.dtype, self.fill)
        return x.type

    def meaning(self, x: Array, keep: Array) -> Array:
        filler = x.data.dtype.type(self.fill)
        return x.map(lambda d: np.where(keep.to(x.axes), d, filler))

    def term(self, algebra: Algebra, x: Tensor, keep: Tensor) -> Tensor:
        if math.isfinite(self.fill) and x.finite:
            return terms.chosen(keep, x, Tensor(algebra, (), algebra.number(self.fill)))
        return replace(terms.pointwise("mask", (self.fill,), (x, keep)), axes=x.axes, finite=False)


@operation("constant")
class ConstantOp(Op):
    """A scalar constant."""

    value = Float("its value")
    dtype = Word("its type", "f32")

    def infer(self) -> TensorType:
        dtype = dtype_of(self.dtype)
        _check_holds(dtype, self.value)
        return TensorType(dtype)

    def meaning(self) -> Array:
        return Array(stored(np.asarray(self.value), DTYPES[self.dtype]), ())

    def term(self, algebra: Algebra) -> Tensor:
        if not math.isfinite(self.value):
            head = Head("constant", (self.value,))
            return Tensor(algebra, (), algebra.apply(head), finite=False)
        return Tensor(algebra, (), algebra.number(self.value))
