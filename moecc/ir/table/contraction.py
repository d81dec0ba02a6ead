"""The one product of tensors: a sum over named axes, every other shared axis a batch axis."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from moecc.errors import InputError
from moecc.ir.operand import Operand
from moecc.ir.ops import Attr, Attrs, OpDef, register
from moecc.ir.table.rules import axis_of, no_ragged, same_dtype, same_size
from moecc.ir.table.sharding import summing
from moecc.ir.traits import PAIR, Role
from moecc.types.tensor import TensorType


def contract_type(x: TensorType, w: TensorType, over: tuple[str, ...]) -> TensorType:
    """Return the type of the contraction of `x` and `w` over the axes `over`.

    Raises:
      InputError: an axis is missing from an operand, or has two sizes.
    """
    dtype = same_dtype((x, w))
    if not dtype.is_float:
        raise InputError("only floating-point operands contract", found=str(x))
    for name in over:
        same_size(axis_of(x, name, "the first operand"), axis_of(w, name, "the second operand"))
    for axis in w.axes:
        mine = x.by_name.get(axis.name)
        if mine is not None:
            same_size(mine, axis)
    no_ragged(x, over, "cannot contract")
    no_ragged(w, over, "cannot contract")
    rest = [a for a in x.axes if a.name not in over]
    more = [a for a in w.axes if a.name not in over and a.name not in x]
    return TensorType(dtype, (*rest, *more))


_cached = lru_cache(maxsize=1024)(contract_type)


def _infer(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    x, w = (v.type for v in operands)
    over: tuple[str, ...] = attrs["over"]
    if not over:
        raise InputError(
            "contract needs an axis to sum over", hint="mul multiplies without summing"
        )
    # An extent holds on to its graph, so a type that has one is not kept.
    if x.extents or w.extents:
        return (contract_type(x, w, over),)
    return (_cached(x, w, over),)


register(
    OpDef(
        "contract",
        "The sum over the named axes of x · w; other axes that both have are batch axes.",
        ("x", "w"),
        _infer,
        attrs={
            "over": Attr("axes", doc="the axes to sum over"),
            "precision": Attr(
                "str", "default", ("default", "f32"), doc="f32: computed in float32 at least"
            ),
        },
        mixes=lambda _operands, attrs: tuple(attrs["over"]),
        linear=(0, 1),
        residual=PAIR,
        sharding=summing("over"),
        roles=(Role.MATRIX, Role.MATRIX),
    )
)
