"""Elementwise operations, casts, selection, and constants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import isfinite
from typing import Any

from moecc.errors import InputError, nearest
from moecc.ir.formula import parse_formula
from moecc.ir.operand import Operand
from moecc.ir.ops import Attr, Attrs, Infer, OpDef, register
from moecc.ir.table.rules import (
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
from moecc.types import DTYPES, F32, KEY, PRED, Axis, DType, TensorType


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
