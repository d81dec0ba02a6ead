"""Chunks: split a value into chunks of which every device has a shard, and join them again.

Work on one chunk may overlap with sending another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from moecc.errors import InputError
from moecc.ir.operand import Definition, Operand
from moecc.ir.ops import Attr, Attrs, OpDef, register
from moecc.ir.table.rules import axis_of, mixes_axis, no_ragged
from moecc.ir.table.sharding import in_parts
from moecc.types.tensor import Axis, TensorType

if TYPE_CHECKING:
    from moecc.ir.mesh import Mesh

_PARTS = Attr("int", 1, doc="how many equal runs of the axis give a piece each to a chunk")


def _whole(type: TensorType, attrs: Attrs, pieces: int) -> tuple[Axis, int]:
    """Return the axis of `type` and its size, which `pieces` divide.

    Raises:
      InputError: they do not, or the size is not fixed.
    """
    axis = axis_of(type, attrs["axis"])
    no_ragged(type, (axis.name,), "cannot cut")
    if pieces < 1 or not isinstance(axis.size, int) or axis.size % pieces:
        raise InputError(
            f"the axis {axis.name!r} cannot be cut into these chunks",
            expected=f"a known size, a multiple of {pieces}",
            found=str(axis),
        )
    return axis, axis.size


def _resized(type: TensorType, axis: Axis, size: int) -> TensorType:
    return type.with_axes(replace(a, size=size) if a is axis else a for a in type.axes)


def _infer_chunk(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    type, of, parts = operands[0].type, attrs["of"], attrs["parts"]
    if not 0 <= attrs["at"] < of or parts < 1:
        raise InputError(
            "there is no such chunk",
            expected="0 <= at < of, and parts of at least 1",
            found=f"at={attrs['at']}, of={of}, parts={parts}",
        )
    axis, size = _whole(type, attrs, of * parts)
    return (_resized(type, axis, size // of),)


def _own_parts(node: Definition, mesh: Mesh) -> Attrs:
    shards = mesh.size(node.result.type[node.attrs["axis"]].mesh)
    return {**node.attrs, "parts": node.attrs["parts"] // shards}


register(
    OpDef(
        "chunk",
        """One of `of` chunks of x along an axis: a piece of each of `parts` equal runs.

        With the axis in parts on a mesh, every device has its piece of every chunk.""",
        ("x",),
        _infer_chunk,
        results=("chunk",),
        attrs={
            "axis": Attr("axis", doc="the axis"),
            "at": Attr("int", doc="which chunk"),
            "of": Attr("int", doc="how many there are"),
            "parts": _PARTS,
        },
        mixes=mixes_axis,
        sharding=in_parts,
        local=_own_parts,
        linear=(0,),
    )
)


def _infer_join(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    first, parts = operands[0].type, attrs["parts"]
    sizes = []
    for value in operands:
        axis, size = _whole(value.type, attrs, parts)
        sizes.append(size)
        # Of pieces that take turns, all are alike; one after the other, each has its own size.
        if (parts > 1 and size != sizes[0]) or _resized(value.type, axis, sizes[0]) != first:
            raise InputError(
                "joined chunks must have one type", expected=str(first), found=str(value.type)
            )
    axis, _ = _whole(first, attrs, parts)
    return (_resized(first, axis, sum(sizes)),)


register(
    OpDef(
        "join",
        """The value whose chunks, in their order, the operands are.

        Without parts they follow one another along the axis, each with a size of its own.""",
        ("x",),
        _infer_join,
        results=("joined",),
        attrs={"axis": Attr("axis", doc="the axis"), "parts": _PARTS},
        mixes=mixes_axis,
        sharding=in_parts,
        local=_own_parts,
        variadic=True,
    )
)
