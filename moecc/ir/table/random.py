"""Random numbers: a key is an operand, and the numbers follow from it and from the place alone."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from moecc.errors import InputError
from moecc.ir.operand import Operand
from moecc.ir.ops import Attr, Attrs, OpDef, register
from moecc.ir.table.rules import need_kind, no_ragged
from moecc.ir.table.sharding import by_place
from moecc.types.dtypes import F32, KEY
from moecc.types.tensor import TensorType


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
