"""Regions of a program that is no graph: what a function of JAX computes between blocks."""

from __future__ import annotations

from collections.abc import Sequence

from moecc.errors import InputError, nearest
from moecc.ir.operand import Operand
from moecc.ir.ops import Attr, Attrs, OpDef, register
from moecc.ir.table.rules import no_duplicates
from moecc.types.dtypes import DTYPES
from moecc.types.tensor import Axis, TensorType


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
