"""Operations that rename, split, merge, broadcast and pick axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from moecc.errors import InputError
from moecc.ir.arrays import NOTHING, Array, meaning
from moecc.ir.operand import Definition, Operand
from moecc.ir.operation import Attr, Attrs, OpDef, register
from moecc.ir.ops.rules import (
    along_axis,
    axis_of,
    by_name,
    cut,
    in_parts,
    looked_up,
    merged,
    mixes_axis,
    need_kind,
    no_duplicates,
    no_ragged,
    renamed,
    same_size,
)
from moecc.ir.traits import Cut, Index, Product, Residual, Role
from moecc.types import F32, I32, Axis, TensorType

if TYPE_CHECKING:
    from moecc.ir.mesh import Mesh


def _infer_rename(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    type = operands[0].type
    old = axis_of(type, attrs["axis"])
    no_ragged(type, (old.name,), "cannot rename")
    new = Axis(attrs["to"], old.size, old.mesh)
    return (type.with_axes(no_duplicates(new if a is old else a for a in type.axes)),)


register(
    OpDef(
        "rename",
        "x with one axis under another name.",
        ("x",),
        _infer_rename,
        attrs={"axis": Attr("axis", doc="the old name"), "to": Attr("axis", doc="the new name")},
        linear=(0,),
        alias=True,
        sharding=renamed,
    )
)


def _infer_split(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    type = operands[0].type
    old = axis_of(type, attrs["axis"])
    no_ragged(type, (old.name,), "cannot split")
    into = tuple(Axis(n, s) for n, s in attrs["into"])
    sizes = [a.size for a in into]
    whole = prod(s for s in sizes if isinstance(s, int))
    if not all(isinstance(s, int) for s in sizes) or whole != old.size:
        raise InputError(
            f"the axis {old.name!r} cannot be split into these sizes",
            expected=f"sizes whose product is {old.size}",
            found=", ".join(map(str, into)),
        )
    axes: list[Axis] = []
    for a in type.axes:
        axes.extend(into if a is old else (a,))
    return (type.with_axes(no_duplicates(axes)),)


def _split_sizes(node: Definition) -> Product:
    whole = node.operands[0].type[node.attrs["axis"]].size
    return Product(whole, tuple(size for _, size in node.attrs["into"]))


def _split_locally(node: Definition, mesh: Mesh) -> Attrs:
    (name, size), *others = node.attrs["into"]
    shards = mesh.size(node.result.type[name].mesh)
    return {**node.attrs, "into": ((name, size // shards), *others)}


register(
    OpDef(
        "split",
        "x with one axis cut into several, the first outermost.",
        ("x",),
        _infer_split,
        attrs={"axis": Attr("axis", doc="the axis"), "into": Attr("sizes", doc="the new axes")},
        linear=(0,),
        alias=True,
        sharding=cut,
        local=_split_locally,
        sizes=_split_sizes,
    )
)


def _infer_merge(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    type = operands[0].type
    names: tuple[str, ...] = attrs["axes"]
    parts = [axis_of(type, n) for n in names]
    no_ragged(type, names, "cannot merge")
    sizes = [a.size for a in parts if isinstance(a.size, int)]
    if len(set(names)) != len(names) or not names or len(sizes) != len(parts):
        raise InputError(
            "only different axes of known size merge", found=", ".join(map(str, parts)) or "no axis"
        )
    merged = Axis(attrs["into"], prod(sizes))
    axes = [merged if a.name == names[0] else a for a in type.axes if a.name not in names[1:]]
    return (type.with_axes(no_duplicates(axes)),)


def _merge_sizes(node: Definition) -> Product:
    parts = tuple(node.operands[0].type[name].size for name in node.attrs["axes"])
    return Product(node.result.type[node.attrs["into"]].size, parts)


register(
    OpDef(
        "merge",
        "x with several axes made one, the first outermost.",
        ("x",),
        _infer_merge,
        attrs={"axes": Attr("axes", doc="the axes"), "into": Attr("axis", doc="the new axis")},
        linear=(0,),
        alias=True,
        sharding=merged,
        sizes=_merge_sizes,
    )
)


def _infer_broadcast(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    x, like = (v.type for v in operands)
    for axis in x.axes:
        same_size(axis_of(like, axis.name, "the operand that gives the axes"), axis)
    return (like.with_dtype(x.dtype),)


register(
    OpDef(
        "broadcast",
        "x repeated along every axis that the second operand has.",
        ("x", "like"),
        _infer_broadcast,
        linear=(0,),
        alias=True,
        sharding=by_name,
    )
)


def _infer_slice(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    type = operands[0].type
    old = axis_of(type, attrs["axis"])
    no_ragged(type, (old.name,), "cannot slice")
    start, stop = attrs["start"], attrs["stop"]
    if not isinstance(old.size, int) or not 0 <= start < stop <= old.size:
        raise InputError(
            f"cannot take [{start}, {stop}) of the axis {old.name!r}",
            found=str(type),
            expected="0 <= start < stop <= size, and a known size",
        )
    return (type.with_axes(Axis(a.name, stop - start) if a is old else a for a in type.axes),)


def _slice_sizes(node: Definition) -> Cut:
    size = node.operands[0].type[node.attrs["axis"]].size
    return Cut(size, (node.attrs["start"], node.attrs["stop"]))


register(
    OpDef(
        "slice",
        "A range of x along one axis.",
        ("x",),
        _infer_slice,
        mixes=mixes_axis,
        linear=(0,),
        alias=True,
        sharding=by_name,
        sizes=_slice_sizes,
        attrs={
            "axis": Attr("axis", doc="the axis"),
            "start": Attr("int", doc="the first index", shrinks=True),
            "stop": Attr("int", doc="the index after the last", shrinks=True),
        },
    )
)


def _infer_positions(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    axis = axis_of(operands[0].type, attrs["axis"])
    if axis.is_ragged:
        raise InputError(f"no positions along the ragged axis {axis.name!r}", found=str(axis))
    return (TensorType(I32, (axis,)),)


register(
    OpDef(
        "positions",
        "0, 1, 2 … along an axis of the operand.",
        ("like",),
        _infer_positions,
        attrs={"axis": Attr("axis", doc="the axis")},
        mixes=mixes_axis,
        sharding=along_axis,
    )
)


def _infer_embedding(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    table, ids = (v.type for v in operands)
    need_kind(ids, "int", "the indices")
    picked = axis_of(table, attrs["axis"], "the table")
    rest = (a for a in table.axes if a is not picked)
    return (table.with_axes(no_duplicates((*ids.axes, *rest))),)


register(
    OpDef(
        "embedding",
        "Rows of a table, picked by index.",
        ("table", "ids"),
        _infer_embedding,
        attrs={"axis": Attr("axis", doc="the axis of the table that the indices run over")},
        mixes=mixes_axis,
        linear=(0,),
        residual=Residual((1,)),
        sharding=looked_up,
        index=Index(1, lambda node: node.operands[0].type[node.attrs["axis"]].size, strict=True),
        roles=(Role.TABLE,),
    )
)


def _infer_one_hot(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    ids = operands[0].type
    need_kind(ids, "int", "the indices")
    into = tuple(Axis(name, size) for name, size in attrs["into"])
    if len(into) != 1 or isinstance(into[0].size, str):
        raise InputError(
            "one_hot makes one axis of known size", found=", ".join(map(str, into)) or "none"
        )
    return (TensorType(F32, no_duplicates((*ids.axes, *into))),)


register(
    OpDef(
        "one_hot",
        "1 at the index, 0 elsewhere, along a new axis.",
        ("ids",),
        _infer_one_hot,
        attrs={"into": Attr("sizes", doc="the new axis and its size")},
        sharding=by_name,
        index=Index(0, lambda node: node.attrs["into"][0][1]),
    )
)


# Chunks: split a value into chunks of which every device has a shard, and join them again.
#
# Work on one chunk may overlap with sending another.

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


# The meaning of the operations that rename, split, merge, broadcast and pick axes.

Sizes = tuple[tuple[str, int], ...]


@meaning("rename")
def rename(x: Array, *, axis: str, to: str) -> Array:
    """Return x with one axis under another name."""
    return Array(x.data, tuple(to if a == axis else a for a in x.axes))


@meaning("split")
def split(x: Array, *, axis: str, into: Sizes) -> Array:
    """Return x with one axis cut into several, the first outermost."""
    at = x.axes.index(axis)
    names, sizes = tuple(n for n, _ in into), tuple(s for _, s in into)
    shape = (*x.data.shape[:at], *sizes, *x.data.shape[at + 1 :])
    return Array(x.data.reshape(shape), (*x.axes[:at], *names, *x.axes[at + 1 :]))


@meaning("merge")
def merge(x: Array, *, axes: tuple[str, ...], into: str) -> Array:
    """Return x with several axes merged, at the position of the first, the first outermost."""
    rest = tuple(a for a in x.axes if a not in axes)
    size = prod(x.size(a) for a in axes)
    shape = (*(x.size(a) for a in rest), size)
    merged = Array(x.to((*rest, *axes)).reshape(shape), (*rest, into))
    order = tuple(into if a == axes[0] else a for a in x.axes if a not in axes[1:])
    return Array(merged.to(order), order)


@meaning("broadcast")
def broadcast(x: Array, like: Array) -> Array:
    """Return x repeated along every axis of `like`."""
    return Array(np.broadcast_to(x.to(like.axes), like.data.shape), like.axes)


@meaning("slice")
def slice_(x: Array, *, axis: str, start: int, stop: int) -> Array:
    """Return the range [start, stop) of x along the axis."""
    return x.map(lambda d: d.take(range(start, stop), x.axes.index(axis)))


@meaning("positions")
def positions(like: Array, *, axis: str) -> Array:
    """Return 0, 1, 2 … along the axis."""
    return Array(np.arange(like.size(axis)), (axis,))


@meaning("embedding")
def embedding(table: Array, ids: Array, *, axis: str) -> Array:
    """Return rows of the table, picked by index.

    Raises:
      InputError: an index is outside the table.
    """
    rest = tuple(a for a in table.axes if a != axis)
    there = ids.data != NOTHING
    wrong = ids.data[there & ((ids.data < 0) | (ids.data >= table.size(axis)))]
    if wrong.size:
        raise InputError(
            "an index is outside the table",
            expected=f"0 <= index < {table.size(axis)} along {axis!r}",
            found=str(wrong[0]),
        )
    rows = table.to((axis, *rest))[np.where(there, ids.data, 0)]
    return Array(rows, (*ids.axes, *rest))


@meaning("one_hot")
def one_hot(ids: Array, *, into: Sizes) -> Array:
    """Return 1 at the index, 0 elsewhere, along a new axis; all 0 for an index outside it."""
    ((name, size),) = into
    hot = ids.data[..., None] == np.arange(size)
    return Array(hot.astype(np.float64), (*ids.axes, name))


# The meaning of chunks.


@meaning("chunk")
def chunk(x: Array, *, axis: str, at: int, of: int, parts: int) -> Array:
    """Return piece `at` of each of `parts` equal runs of the axis, one after the other."""
    place = x.axes.index(axis)
    before, size, after = x.data.shape[:place], x.size(axis), x.data.shape[place + 1 :]
    cells = x.data.reshape(*before, parts, of, size // (parts * of), *after)
    picked = cells.take(at, place + 1)
    return Array(picked.reshape(*before, size // of, *after), x.axes)


@meaning("join")
def join(*chunks: Array, axis: str, parts: int) -> Array:
    """Return the value whose chunks these are."""
    first = chunks[0]
    if parts == 1:
        together = [c.to(first.axes) for c in chunks]
        return Array(np.concatenate(together, first.axes.index(axis)), first.axes)
    place = first.axes.index(axis)
    before, size, after = first.data.shape[:place], first.size(axis), first.data.shape[place + 1 :]
    cells = [c.data.reshape(*before, parts, size // parts, *after) for c in chunks]
    joined = np.stack(cells, place + 1).reshape(*before, size * len(chunks), *after)
    return Array(joined, first.axes)
