"""Reductions and normalisations."""

from __future__ import annotations

from collections.abc import Sequence

from moecc.errors import InputError
from moecc.ir.operand import Operand
from moecc.ir.ops import Attr, Attrs, OpDef, register
from moecc.ir.table.rules import (
    axis_of,
    mixes_axis,
    need_float,
    no_ragged,
    same_dtype,
    same_size,
)
from moecc.ir.table.sharding import by_name, summing
from moecc.ir.traits import BOTH, NOTHING, PAIR, RESULT, Homogeneity, Residual, Role, powers
from moecc.support.untyped import JsonDict
from moecc.types.tensor import TensorType


def _infer_reduce(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    type = operands[0].type
    need_float(type)
    for name in attrs["axes"]:
        axis_of(type, name)
    no_ragged(type, attrs["axes"], "cannot reduce")
    return (type.without(*attrs["axes"]),)


def _mixes_axes(operands: Sequence[Operand], attrs: Attrs) -> tuple[str, ...]:
    return tuple(attrs["axes"])


def _reduction(
    name: str,
    doc: str,
    *,
    linear: tuple[int, ...] = (),
    residual: Residual = NOTHING,
    homogeneous: Homogeneity | None = None,
) -> None:
    """Add a reduction to the table; one that is linear is a sum, which may lie unreduced."""
    register(
        OpDef(
            name,
            doc,
            ("x",),
            _infer_reduce,
            attrs={"axes": Attr("axes", doc="the axes")},
            mixes=_mixes_axes,
            linear=linear,
            residual=residual,
            homogeneous=homogeneous,
            sharding=summing("axes") if linear else by_name,
        )
    )


_reduction("sum", "The sum over the named axes.", linear=(0,))
_reduction("mean", "The mean over the named axes.", linear=(0,))
_reduction("max", "The maximum over the named axes.", residual=BOTH, homogeneous=powers(1))
_reduction("logsumexp", "log Σ exp(x) over the named axes, without overflow.", residual=BOTH)


def _infer_softmax(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    type = operands[0].type
    need_float(type)
    axis_of(type, attrs["axis"])
    no_ragged(type, (attrs["axis"],), "cannot normalise")
    return (type,)


register(
    OpDef(
        "softmax",
        "exp(x) over its sum along an axis; zeros where all of it is −∞, and nothing is seen.",
        ("x",),
        _infer_softmax,
        attrs={"axis": Attr("axis", doc="the axis")},
        mixes=mixes_axis,
        residual=RESULT,
        normalises=True,
        sharding=by_name,
    )
)


def _infer_norm(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    x, *vectors = (v.type for v in operands)
    need_float(x)
    axis = axis_of(x, attrs["axis"])
    no_ragged(x, (axis.name,), "cannot normalise")
    same_dtype((x, *vectors))
    for vector in vectors:
        if vector.names != (axis.name,):
            raise InputError(
                "a norm is scaled by a vector along its own axis",
                expected=f"one axis {axis}",
                found=str(vector),
            )
        same_size(axis, vector[axis.name])
    return (x,)


_NORM = {
    "axis": Attr("axis", doc="the axis"),
    "eps": Attr("float", 1e-6, doc="added under the root"),
}
_ROWS: JsonDict = {
    "residual": PAIR,
    "normalises": True,
    "sharding": by_name,
}

register(
    OpDef(
        "rms_norm",
        "x / √(mean(x²) + eps) · scale (Zhang and Sennrich 2019).",
        ("x", "scale"),
        _infer_norm,
        attrs=_NORM,
        mixes=mixes_axis,
        linear=(1,),
        **_ROWS,
        roles=(Role.VALUE, Role.GAIN),
    )
)
register(
    OpDef(
        "layer_norm",
        "(x − mean) / √(variance + eps) · scale + bias (Ba et al. 2016).",
        ("x", "scale", "bias"),
        _infer_norm,
        attrs=_NORM,
        mixes=mixes_axis,
        **_ROWS,
        roles=(Role.VALUE, Role.GAIN, Role.BIAS),
    )
)
