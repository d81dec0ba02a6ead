"""Elementwise operations, casts, selection, and constants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from moecc.errors import InputError, nearest
from moecc.ir.formula import parse_formula
from moecc.ir.operand import Operand
from moecc.ir.ops import Attr, Attrs, Infer, OpDef, register
from moecc.ir.table.rules import (
    arithmetic,
    elementwise,
    float_elementwise,
    need_kind,
    same_dtype,
    widest,
)
from moecc.ir.table.sharding import by_name
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
from moecc.types.dtypes import DTYPES, PRED, DType
from moecc.types.tensor import TensorType


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
