"""Typing rules that several operations share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moecc.errors import InputError, nearest
from moecc.ir.operand import Operand
from moecc.ir.ops import Attrs
from moecc.types.dtypes import DType
from moecc.types.tensor import Axis, TensorType


def axis_of(type: TensorType, name: str, what: str = "the operand") -> Axis:
    """Return the axis `name` of `type`.

    Raises:
      InputError: there is no such axis; the nearest name is suggested.
    """
    axis = type.by_name.get(name)
    if axis is None:
        raise InputError(
            f"{what} has no axis {name!r}", found=str(type), hint=nearest(name, type.names)
        )
    return axis


def need_float(type: TensorType, what: str = "the operand") -> None:
    """Raise InputError unless `type` has floating-point elements."""
    if not type.dtype.is_float:
        raise InputError(f"{what} must be floating-point", found=str(type))


def need_kind(type: TensorType, kind: str, what: str) -> None:
    """Raise InputError unless the elements of `type` are of `kind`."""
    if type.dtype.kind != kind:
        raise InputError(f"{what} must have {kind} elements", found=str(type))


def same_size(a: Axis, b: Axis) -> None:
    """Raise InputError unless two axes of one name have the same size."""
    if a.size != b.size:
        raise InputError(
            f"the axis {a.name!r} has two sizes",
            expected=str(a),
            found=str(b),
            hint="rename one of them, or slice it",
        )


def same_dtype(types: Sequence[TensorType]) -> DType:
    """Return the element type that all `types` share.

    Raises:
      InputError: they differ.
    """
    first = types[0].dtype
    for other in types:
        if other.dtype is not first and other.dtype != first:
            raise InputError(
                "the operands have different element types",
                expected=str(first),
                found=str(other.dtype),
                hint="cast one of them",
            )
    return first


def widest(types: Sequence[TensorType]) -> TensorType:
    """Return the operand type whose axes contain those of all others.

    Raises:
      InputError: an operand has an axis that the widest lacks, or sizes differ.
    """
    wide = max(types, key=len)
    for other in types:
        if other is wide:
            continue
        for axis in other.axes:
            mine = wide.by_name.get(axis.name)
            if mine is None:
                raise InputError(
                    f"no operand has all axes: {axis.name!r} is missing from one",
                    expected=f"axes contained in {wide}",
                    found=str(other),
                    hint="broadcast the operand that lacks the axis",
                )
            if mine.size != axis.size:
                same_size(mine, axis)
    return wide


def elementwise(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    """Infer the type of an elementwise operation: the operand type with all the axes."""
    first = operands[0].type
    if all(v.type is first for v in operands):
        return (first,)
    types = [v.type for v in operands]
    same_dtype(types)
    return (widest(types),)


def arithmetic(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    """Infer an elementwise type of numeric operands."""
    for v in operands:
        if v.type.dtype.kind not in ("float", "int"):
            raise InputError("arithmetic needs numbers", found=str(v.type))
    return elementwise(operands, attrs)


def float_elementwise(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    """Infer an elementwise type of floating-point operands."""
    for v in operands:
        need_float(v.type)
    return elementwise(operands, attrs)


def mixes_axis(operands: Sequence[Operand], attrs: Attrs) -> tuple[str, ...]:
    """Return the axis that the attribute ``axis`` names."""
    return (attrs["axis"],)


def no_duplicates(axes: Iterable[Axis]) -> tuple[Axis, ...]:
    """Return `axes`.

    Raises:
      InputError: two of them have the same name.
    """
    result = tuple(axes)
    names = [a.name for a in result]
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise InputError(
            f"the result would have two axes {twice!r}",
            found=", ".join(map(str, result)),
            hint="rename one of them first",
        )
    return result


EXTENT_AXES = ("group", "expert")
"""The axes over which each kind of extent varies."""


def no_ragged(type: TensorType, names: Iterable[str], what: str) -> None:
    """Raise InputError if `type` is ragged and its extents depend on one of the axes `names`.

    Rows beyond an extent do not exist, so nothing may mix along them, nor along the axes on
    which the extents depend: the same slot of two experts may exist for one of them only.
    """
    ragged = type.ragged
    if ragged is None:
        return
    for name in names:
        if name == ragged.name:
            raise InputError(f"{what} along the ragged axis {name!r}", found=str(type))
        if name in EXTENT_AXES:
            raise InputError(
                f"{what} along the axis {name!r}, on which the extents of {ragged.name!r} depend",
                found=str(type),
                hint="combine the rows first, or give the experts a capacity",
            )
