"""Rows combined by their gates, or gates sent with the rows, which come back weighted.

``combine(rows, gates)`` is ``combine_weighted(weight_rows(rows, dispatch_gates(gates)))``.  Where
rows return from other devices, the gradient of the gates then needs no row that has returned.
"""

from __future__ import annotations

from collections.abc import Sequence

from moecc.ir.operand import Operand
from moecc.ir.ops import Attr, Attrs, OpDef, register
from moecc.ir.table.rules import axis_of, need_float, no_duplicates, same_size
from moecc.ir.table.sharding import by_name, combined, gates_dispatched
from moecc.ir.table.slots import (
    assigner,
    check_experts,
    check_gates,
    slot_axes,
    tokens_of,
)
from moecc.ir.traits import PAIR, Residual, RowMove
from moecc.types.tensor import TensorType


def _infer_combine(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    rows, experts, slots, gates = operands
    check_experts(slots, experts)
    check_gates(slots, gates.type)
    need_float(gates.type, "the gates")
    return (_combined_type(rows.type, slots),)


def _combined_type(rows: TensorType, slots: Operand) -> TensorType:
    """Return the type of the tokens that `rows` are combined to.

    Raises:
      InputError: the rows are not those of `slots`, or no numbers.
    """
    for axis in slot_axes(slots):
        same_size(axis_of(rows, axis.name, "the rows"), axis)
    need_float(rows, "the rows")
    tokens = tokens_of(slots)
    inner = (a for a in rows.axes if a.name not in ("group", "expert", "slot"))
    outer = (a for a in slots.type.axes if a.name in tokens)
    return rows.with_axes(no_duplicates((*outer, *inner)))


def _mixes_rows(operands: Sequence[Operand], attrs: Attrs) -> tuple[str, ...]:
    """Return what an operation mixes that makes tokens of rows."""
    # The position of a token determines the group of its rows.
    return ("group", "expert", "slot", *tokens_of(operands[2]))


register(
    OpDef(
        "combine",
        "For each token the sum over its choices of gate times row; a dropped one adds nothing.",
        ("rows", "experts", "slots", "gates"),
        _infer_combine,
        mixes=_mixes_rows,
        linear=(0, 3),
        residual=Residual((0, 1, 2, 3)),
        sharding=combined,
        moves=RowMove.TO_TOKENS,
    )
)


def _infer_dispatch_gates(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    gates, experts, slots = operands
    check_experts(slots, experts)
    check_gates(slots, gates.type)
    need_float(gates.type, "the gates")
    return (gates.type.with_axes(slot_axes(slots)),)


register(
    OpDef(
        "dispatch_gates",
        "The gate of the choice that has each slot; an empty slot holds zero.",
        ("gates", "experts", "slots"),
        _infer_dispatch_gates,
        results=("row_gates",),
        mixes=lambda operands, _attrs: operands[0].type.names,
        linear=(0,),
        residual=Residual((1, 2)),
        sharding=gates_dispatched,
        moves=RowMove.GATES_TO_SLOTS,
    )
)


def _infer_weight_rows(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    rows, gates = (v.type for v in operands)
    need_float(rows, "the rows")
    need_float(gates, "the gates")
    for axis in gates:
        same_size(axis_of(rows, axis.name, "the rows"), axis)
    return (rows,)


register(
    OpDef(
        "weight_rows",
        "Each row times its gate, in the type of the rows.",
        ("rows", "row_gates"),
        _infer_weight_rows,
        results=("weighted",),
        attrs={
            "precision": Attr(
                "str", "f32", ("default", "f32"), doc="of the product, before it is rounded"
            )
        },
        linear=(0, 1),
        elementwise=True,
        residual=PAIR,
        sharding=by_name,
    )
)


def _infer_combine_weighted(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    rows, experts, slots = operands
    check_experts(slots, experts)
    assigner(slots)
    return (_combined_type(rows.type, slots),)


register(
    OpDef(
        "combine_weighted",
        "For each token the sum over its choices of their rows; a dropped one adds nothing.",
        ("rows", "experts", "slots"),
        _infer_combine_weighted,
        mixes=_mixes_rows,
        linear=(0,),
        residual=Residual((1, 2)),
        sharding=combined,
        moves=RowMove.TO_TOKENS,
    )
)
