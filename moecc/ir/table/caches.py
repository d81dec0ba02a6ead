"""Ranges written into a value at an index: the caches of keys and values that decoding keeps."""

from __future__ import annotations

from collections.abc import Sequence

from moecc.errors import InputError
from moecc.ir.operand import Operand
from moecc.ir.ops import Attr, Attrs, OpDef, register
from moecc.ir.table.rules import axis_of, mixes_axis, need_kind, no_ragged
from moecc.ir.table.sharding import by_name
from moecc.ir.traits import powers
from moecc.types.tensor import TensorType


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
