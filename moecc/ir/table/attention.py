"""Rotary positions and causal masks; attention itself is contract, mask and softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moecc.errors import InputError
from moecc.ir.dtypes import F32, PRED
from moecc.ir.ops import Attr, Attrs, OpDef, register
from moecc.ir.table.rules import axis_of, mixes_axis, need_kind, no_duplicates, widest
from moecc.ir.types import Axis, TensorType

if TYPE_CHECKING:
    from moecc.ir.graph import Value


def _infer_rope(operands: Sequence[Value], attrs: Attrs) -> tuple[TensorType, ...]:
    positions = operands[0].type
    need_kind(positions, "int", "the positions")
    if attrs["size"] <= 0 or attrs["size"] % 2:
        raise InputError("rotary tables have an even number of entries", found=str(attrs["size"]))
    axes = no_duplicates((*positions.axes, Axis(attrs["axis"], attrs["size"])))
    return (TensorType(F32, axes), TensorType(F32, axes))


def _mixes_positions(operands: Sequence[Value], attrs: Attrs) -> tuple[str, ...]:
    # Dynamic scaling looks at the largest position of all.
    return operands[0].type.names if attrs["scaling"] == "dynamic" else ()


ROPE_SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn")

register(
    OpDef(
        "rope",
        "Tables of cosines and sines for rotary positions, both halves alike (Su et al. 2021).",
        ("positions",),
        _infer_rope,
        results=("cos", "sin"),
        attrs={
            "axis": Attr("axis", doc="the new axis"),
            "size": Attr("int", doc="its size, the head dimension"),
            "theta": Attr("float", 10000.0, doc="the base of the frequencies"),
            "scaling": Attr("str", "default", ROPE_SCALINGS, doc="how the frequencies are scaled"),
            "factor": Attr("float", 1.0, doc="the scaling factor"),
            "original_context": Attr("int", 0, doc="the context length before scaling"),
            "low_freq_factor": Attr("float", 1.0, doc="llama3"),
            "high_freq_factor": Attr("float", 4.0, doc="llama3"),
            "beta_fast": Attr("float", 32.0, doc="yarn"),
            "beta_slow": Attr("float", 1.0, doc="yarn"),
            "truncate": Attr("bool", True, doc="yarn: whether its bounds are rounded to integers"),
            "attention_factor": Attr("float", 1.0, doc="what both tables are multiplied by"),
        },
        mixes=_mixes_positions,
    )
)


def _infer_rotate(operands: Sequence[Value], attrs: Attrs) -> tuple[TensorType, ...]:
    x, cos, sin = (v.type for v in operands)
    axis_of(x, attrs["axis"])
    wide = widest((x, cos, sin))
    if wide.names != x.names or attrs["axis"] not in cos or attrs["axis"] not in sin:
        raise InputError(
            "the tables must lie within the rotated value and have its axis",
            expected=f"axes of {x}",
            found=f"{cos} and {sin}",
        )
    return (x,)


register(
    OpDef(
        "rotate",
        "x · cos + rotate_half(x) · sin along an axis; the halves are paired, as in GPT-NeoX.",
        ("x", "cos", "sin"),
        _infer_rotate,
        attrs={"axis": Attr("axis", doc="the axis")},
        mixes=mixes_axis,
        linear=(0,),
    )
)


def _infer_causal(operands: Sequence[Value], attrs: Attrs) -> tuple[TensorType, ...]:
    query, key = (v.type for v in operands)
    need_kind(query, "int", "the positions of the queries")
    need_kind(key, "int", "the positions of the keys")
    return (TensorType(PRED, no_duplicates((*query.axes, *key.axes))),)


register(
    OpDef(
        "causal",
        "Whether a query may see a key: key ≤ query, and query − key < window if there is one.",
        ("query", "key"),
        _infer_causal,
        attrs={"window": Attr("int", 0, doc="the sliding window in tokens; 0: none")},
    )
)
