"""Elementwise operations, casts, selection, and constants."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moecc.errors import InputError, nearest
from moecc.ir.dtypes import DTYPES, PRED, DType
from moecc.ir.operand import Operand
from moecc.ir.ops import Attr, Attrs, OpDef, register
from moecc.ir.table.rules import (
    arithmetic,
    elementwise,
    float_elementwise,
    need_kind,
    same_dtype,
    widest,
)
from moecc.ir.types import TensorType

UNARY = {
    "silu": "x · sigmoid(x).",
    "gelu": "x · Φ(x), with the error function.",
    "gelu_tanh": "GELU by its tanh approximation (Hendrycks and Gimpel 2016).",
    "relu": "max(x, 0).",
    "sigmoid": "1 / (1 + exp(−x)).",
    "tanh": "The hyperbolic tangent.",
    "exp": "The exponential.",
    "log": "The natural logarithm.",
    "square": "x².",
    "rsqrt": "1 / √x.",
    "normal_cdf": "Φ(x), the distribution function of a standard normal variable.",
}

for _name, _doc in UNARY.items():
    register(OpDef(_name, _doc, ("x",), float_elementwise))

register(OpDef("neg", "−x.", ("x",), arithmetic, linear=(0,)))
register(
    OpDef(
        "scale",
        "x times a constant.",
        ("x",),
        float_elementwise,
        attrs={"by": Attr("float", doc="the factor")},
        linear=(0,),
    )
)
register(
    OpDef("stop_gradient", "x, through which no gradient flows.", ("x",), elementwise, linear=(0,))
)

register(
    OpDef("add", "a + b.", ("a", "b"), arithmetic, linear=(0, 1), jointly=True, commutative=True)
)
register(OpDef("sub", "a − b.", ("a", "b"), arithmetic, linear=(0, 1), jointly=True))
register(OpDef("mul", "a · b.", ("a", "b"), arithmetic, linear=(0, 1), commutative=True))
register(OpDef("div", "a / b.", ("a", "b"), float_elementwise, linear=(0,)))
register(OpDef("maximum", "The larger of a and b.", ("a", "b"), arithmetic, commutative=True))
register(OpDef("minimum", "The smaller of a and b.", ("a", "b"), arithmetic, commutative=True))


def _infer_cast(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    dtype = DTYPES.get(attrs["dtype"])
    if dtype is None:
        raise InputError(
            f"unknown element type {attrs['dtype']!r}", hint=nearest(attrs["dtype"], DTYPES)
        )
    return (operands[0].type.with_dtype(dtype),)


register(
    OpDef(
        "cast",
        "x in another element type, to nearest even; from a float to an integer, towards zero.",
        ("x",),
        _infer_cast,
        attrs={"dtype": Attr("str", doc="the element type")},
        linear=(0,),
    )
)


def _infer_select(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    condition, *branches = (v.type for v in operands)
    need_kind(condition, "bool", "the condition")
    dtype = same_dtype(branches)
    return (widest([*branches, condition]).with_dtype(dtype),)


register(
    OpDef(
        "select",
        "a where the condition holds, b elsewhere.",
        ("condition", "a", "b"),
        _infer_select,
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
    OpDef(
        "mask",
        "x where the mask keeps it, a constant elsewhere.",
        ("x", "keep"),
        _infer_mask,
        attrs={"fill": Attr("float", float("-inf"), doc="what stands where nothing is kept")},
    )
)


def _infer_compare(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    return (elementwise(operands, attrs)[0].with_dtype(PRED),)


register(OpDef("less", "Whether a < b.", ("a", "b"), _infer_compare))
register(OpDef("equal", "Whether a = b.", ("a", "b"), _infer_compare, commutative=True))


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
