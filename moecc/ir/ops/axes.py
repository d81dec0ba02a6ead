"""Operations that rename, split, merge, broadcast, pick, cut and join axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from moecc.errors import InputError
from moecc.ir.arrays import NOTHING, Array
from moecc.ir.operand import Attrs, Definition, Operand
from moecc.ir.operation import AxisName, AxisNames, AxisSizes, Int, Op, operation
from moecc.ir.ops.contraction import AlongAxisOp
from moecc.ir.ops.rules import (
    along_axis,
    axis_of,
    by_name,
    cut,
    in_parts,
    looked_up,
    merged,
    need_kind,
    no_duplicates,
    no_ragged,
    renamed,
    same_size,
)
from moecc.ir.traits import Cut, IndexOperand, Product, Residual, Role, powers
from moecc.support.lazy import np
from moecc.terms import tensor as terms
from moecc.terms.tensor import Tensor
from moecc.terms.term import Algebra, Head
from moecc.types import F32, I32, Axis, TensorType

if TYPE_CHECKING:
    from moecc.ir.mesh import Mesh


@operation("rename", "x", linear=(0,), alias=True, sharding=renamed, rearranges=True)
class RenameOp(Op):
    """x with one axis under another name."""

    axis = AxisName("the old name")
    to = AxisName("the new name")

    def infer(self, x: Operand) -> TensorType:
        old = axis_of(x.type, self.axis)
        no_ragged(x.type, (old.name,), "cannot rename")
        new = Axis(self.to, old.size, old.mesh)
        return x.type.with_axes(no_duplicates(new if a is old else a for a in x.type.axes))

    def meaning(self, x: Array) -> Array:
        return Array(x.data, tuple(self.to if a == self.axis else a for a in x.axes))

    def term(self, algebra: Algebra, x: Tensor) -> Tensor:
        new = algebra.axis(self.to, x.axis(self.axis).size)
        axes = (new if v.name == self.axis else v for v in x.axes)
        return x.moved(axes, {self.axis: algebra.index(new)})


def _split_sizes(node: Definition) -> Product:
    size = node.operands[0].type[node.attrs["axis"]].size
    return Product(size, tuple(size for _, size in node.attrs["into"]))


def _split_locally(node: Definition, mesh: Mesh) -> Attrs:
    (name, size), *inner = node.attrs["into"]
    shards = mesh.size(node.result.type[name].mesh)
    return {**node.attrs, "into": ((name, size // shards), *inner)}


@operation(
    "split",
    "x",
    linear=(0,),
    alias=True,
    sharding=cut,
    local=_split_locally,
    sizes=_split_sizes,
    rearranges=True,
)
class SplitOp(Op):
    """x with one axis cut into several, the first outermost."""

    axis = AxisName("the axis")
    into = AxisSizes("the new axes")

    def infer(self, x: Operand) -> TensorType:
        old = axis_of(x.type, self.axis)
        no_ragged(x.type, (old.name,), "cannot split")
        into = tuple(Axis(n, s) for n, s in self.into)
        sizes = [a.size for a in into if isinstance(a.size, int)]
        if len(sizes) != len(into) or prod(sizes) != old.size:
            raise InputError(
                f"the axis {old.name!r} cannot be split into these sizes",
                expected=f"sizes whose product is {old.size}",
                found=", ".join(map(str, into)),
            )
        axes = (new for a in x.type.axes for new in (into if a is old else (a,)))
        return x.type.with_axes(no_duplicates(axes))

    def meaning(self, x: Array) -> Array:
        at = x.axes.index(self.axis)
        names, sizes = [n for n, _ in self.into], [s for _, s in self.into]
        shape = (*x.data.shape[:at], *sizes, *x.data.shape[at + 1 :])
        return Array(x.data.reshape(shape), (*x.axes[:at], *names, *x.axes[at + 1 :]))

    def term(self, algebra: Algebra, x: Tensor) -> Tensor:
        return terms.split(x, self.axis, self.into)  # type: ignore[arg-type]


def _merge_sizes(node: Definition) -> Product:
    parts = tuple(node.operands[0].type[name].size for name in node.attrs["axes"])
    return Product(node.result.type[node.attrs["into"]].size, parts)


@operation(
    "merge",
    "x",
    linear=(0,),
    alias=True,
    sharding=merged,
    sizes=_merge_sizes,
    rearranges=True,
)
class MergeOp(Op):
    """x with several axes made one, the first outermost."""

    axes = AxisNames("the axes")
    into = AxisName("the new axis")

    def infer(self, x: Operand) -> TensorType:
        names = self.axes
        parts = [axis_of(x.type, n) for n in names]
        no_ragged(x.type, names, "cannot merge")
        sizes = [a.size for a in parts if isinstance(a.size, int)]
        if len(set(names)) != len(names) or not names or len(sizes) != len(parts):
            raise InputError(
                "only different axes of known size merge",
                found=", ".join(map(str, parts)) or "no axis",
            )
        axis = Axis(self.into, prod(sizes))
        axes = (axis if a.name == names[0] else a for a in x.type.axes if a.name not in names[1:])
        return x.type.with_axes(no_duplicates(axes))

    def meaning(self, x: Array) -> Array:
        """Return x with the merged axis at the position of the first of its parts."""
        outer = tuple(a for a in x.axes if a not in self.axes)
        shape = (*(x.size(a) for a in outer), prod(x.size(a) for a in self.axes))
        result = Array(x.to((*outer, *self.axes)).reshape(shape), (*outer, self.into))
        first, *others = self.axes
        order = tuple(self.into if a == first else a for a in x.axes if a not in others)
        return Array(result.to(order), order)

    def term(self, algebra: Algebra, x: Tensor) -> Tensor:
        return terms.merged(x, self.axes, self.into)


@operation("broadcast", "x like", linear=(0,), alias=True, sharding=by_name, rearranges=True)
class BroadcastOp(Op):
    """x repeated along every axis that the second operand has."""

    def infer(self, x: Operand, like: Operand) -> TensorType:
        for axis in x.type.axes:
            same_size(axis_of(like.type, axis.name, "the operand that gives the axes"), axis)
        return like.type.with_dtype(x.type.dtype)

    def meaning(self, x: Array, like: Array) -> Array:
        return Array(np.broadcast_to(x.to(like.axes), like.data.shape), like.axes)

    def term(self, algebra: Algebra, x: Tensor, like: Tensor) -> Tensor:
        return replace(x, axes=like.axes, slots=None)


def _slice_sizes(node: Definition) -> Cut:
    size = node.operands[0].type[node.attrs["axis"]].size
    return Cut(size, (node.attrs["start"], node.attrs["stop"]))


@operation(
    "slice",
    "x",
    linear=(0,),
    alias=True,
    sharding=by_name,
    sizes=_slice_sizes,
    rearranges=True,
)
class SliceOp(AlongAxisOp):
    """A range of x along one axis."""

    start = Int("the first index", shrinks=True)
    stop = Int("the index after the last", shrinks=True)

    def infer(self, x: Operand) -> TensorType:
        old = axis_of(x.type, self.axis)
        no_ragged(x.type, (old.name,), "cannot slice")
        if not isinstance(old.size, int) or not 0 <= self.start < self.stop <= old.size:
            raise InputError(
                f"cannot take [{self.start}, {self.stop}) of the axis {old.name!r}",
                found=str(x.type),
                expected="0 <= start < stop <= size, and a known size",
            )
        new = Axis(old.name, self.stop - self.start)
        return x.type.with_axes(new if a is old else a for a in x.type.axes)

    def meaning(self, x: Array) -> Array:
        return x.map(lambda d: d.take(range(self.start, self.stop), x.axes.index(self.axis)))

    def term(self, algebra: Algebra, x: Tensor) -> Tensor:
        new = algebra.axis(self.axis, self.stop - self.start)
        position = algebra.add(algebra.index(new), algebra.number(self.start))
        axes = (new if v.name == self.axis else v for v in x.axes)
        return x.moved(axes, {self.axis: position})


@operation("positions", "like", sharding=along_axis)
class PositionsOp(AlongAxisOp):
    """0, 1, 2 … along an axis of the operand."""

    def infer(self, like: Operand) -> TensorType:
        axis = axis_of(like.type, self.axis)
        if axis.is_ragged:
            raise InputError(f"no positions along the ragged axis {axis.name!r}", found=str(axis))
        return TensorType(I32, (axis,))

    def meaning(self, like: Array) -> Array:
        return Array(np.arange(like.size(self.axis)), (self.axis,))

    def term(self, algebra: Algebra, like: Tensor) -> Tensor:
        axis = like.axis(self.axis)
        return Tensor(algebra, (axis,), algebra.index(axis))


@operation(
    "embedding",
    "table ids",
    linear=(0,),
    residual=Residual((1,)),
    sharding=looked_up,
    index=IndexOperand(1, lambda node: node.operands[0].type[node.attrs["axis"]].size, strict=True),
    roles=(Role.TABLE,),
)
class EmbeddingOp(AlongAxisOp):
    """Rows of a table, picked by index."""

    axis = AxisName("the axis of the table that the indices run over")

    def infer(self, table: Operand, ids: Operand) -> TensorType:
        need_kind(ids.type, "int", "the indices")
        axis = axis_of(table.type, self.axis, "the table")
        row = (a for a in table.type.axes if a is not axis)
        return table.type.with_axes(no_duplicates((*ids.type.axes, *row)))

    def meaning(self, table: Array, ids: Array) -> Array:
        size, row = table.size(self.axis), tuple(a for a in table.axes if a != self.axis)
        exists = ids.data != NOTHING
        wrong = ids.data[exists & ((ids.data < 0) | (ids.data >= size))]
        if wrong.size:
            raise InputError(
                "an index is outside the table",
                expected=f"0 <= index < {size} along {self.axis!r}",
                found=str(wrong[0]),
            )
        rows = table.to((self.axis, *row))[np.where(exists, ids.data, 0)]
        return Array(rows, (*ids.axes, *row))

    def term(self, algebra: Algebra, table: Tensor, ids: Tensor) -> Tensor:
        return table.moved((*ids.axes, *table.without(self.axis)), {self.axis: ids.body})


@operation(
    "one_hot", "ids", sharding=by_name, index=IndexOperand(0, lambda node: node.attrs["into"][0][1])
)
class OneHotOp(Op):
    """1 at the index, 0 elsewhere, along a new axis."""

    into = AxisSizes("the new axis and its size")

    def infer(self, ids: Operand) -> TensorType:
        need_kind(ids.type, "int", "the indices")
        into = tuple(Axis(name, size) for name, size in self.into)
        if len(into) != 1 or isinstance(into[0].size, str):
            raise InputError(
                "one_hot makes one axis of known size", found=", ".join(map(str, into)) or "none"
            )
        return TensorType(F32, no_duplicates((*ids.type.axes, *into)))

    def meaning(self, ids: Array) -> Array:
        ((name, size),) = self.into
        assert isinstance(size, int), "the type is checked"
        hot = ids.data[..., None] == np.arange(size)
        return Array(hot.astype(np.float64), (*ids.axes, name))

    def term(self, algebra: Algebra, ids: Tensor) -> Tensor:
        ((name, size),) = self.into
        assert isinstance(size, int), "the type is checked"
        new = algebra.axis(name, size)
        gap = algebra.subtract(ids.body, algebra.index(new))
        return Tensor(algebra, (*ids.axes, new), algebra.apply(Head("equal"), (), [gap]))


# Chunks: split a value into chunks of which every device has a shard, and join them again.
# Work on one chunk may overlap with sending another.


def _chunked_axis(type: TensorType, name: str, pieces: int) -> tuple[Axis, int]:
    """Return the axis `name` of `type` and its size, which `pieces` divide.

    Raises:
      InputError: they do not, or the size is not fixed.
    """
    axis = axis_of(type, name)
    no_ragged(type, (name,), "cannot cut")
    if pieces < 1 or not isinstance(axis.size, int) or axis.size % pieces:
        raise InputError(
            f"the axis {name!r} cannot be cut into these chunks",
            expected=f"a known size, a multiple of {pieces}",
            found=str(axis),
        )
    return axis, axis.size


def _resized(type: TensorType, axis: Axis, size: int) -> TensorType:
    return type.with_axes(replace(a, size=size) if a is axis else a for a in type.axes)


def _local_parts(node: Definition, mesh: Mesh) -> Attrs:
    shards = mesh.size(node.result.type[node.attrs["axis"]].mesh)
    return {**node.attrs, "parts": node.attrs["parts"] // shards}


@operation("chunk", "x", results=("chunk",), sharding=in_parts, local=_local_parts, linear=(0,))
class ChunkOp(AlongAxisOp):
    """One of `of` chunks of x along an axis: a piece of each of `parts` equal runs.

    With the axis in parts on a mesh, every device has its piece of every chunk.
    """

    at = Int("which chunk")
    of = Int("how many there are")
    parts = Int("how many equal runs of the axis give a piece each to a chunk", 1)

    def infer(self, x: Operand) -> TensorType:
        if not 0 <= self.at < self.of or self.parts < 1:
            raise InputError(
                "there is no such chunk",
                expected="0 <= at < of, and parts of at least 1",
                found=f"at={self.at}, of={self.of}, parts={self.parts}",
            )
        axis, size = _chunked_axis(x.type, self.axis, self.of * self.parts)
        return _resized(x.type, axis, size // self.of)

    def meaning(self, x: Array) -> Array:
        number, size = x.axes.index(self.axis), x.size(self.axis)
        before, after = x.data.shape[:number], x.data.shape[number + 1 :]
        cells = x.data.reshape(*before, self.parts, self.of, size // (self.parts * self.of), *after)
        picked = cells.take(self.at, number + 1)
        return Array(picked.reshape(*before, size // self.of, *after), x.axes)

    def term(self, algebra: Algebra, x: Tensor) -> Tensor:
        size = x.axis(self.axis).size
        assert isinstance(size, int), "the type is checked"
        new, piece = algebra.axis(self.axis, size // self.of), size // (self.parts * self.of)
        part = terms.quotient(algebra, algebra.index(new), piece)
        inner = terms.remainder(algebra, algebra.index(new), piece)
        outer = algebra.add(algebra.scale(part, self.of), algebra.number(self.at))
        position = algebra.add(algebra.scale(outer, piece), inner)
        axes = (new if v.name == self.axis else v for v in x.axes)
        return x.moved(axes, {self.axis: position})


@operation("join", "x", results=("joined",), sharding=in_parts, local=_local_parts, variadic=True)
class JoinOp(AlongAxisOp):
    """The value whose chunks, in their order, the operands are.

    Without parts they follow one another along the axis, each with a size of its own.
    """

    parts = Int("how many equal runs of the axis give a piece each to a chunk", 1)

    def infer(self, *chunks: Operand) -> TensorType:
        first, sizes = chunks[0].type, []
        for value in chunks:
            axis, size = _chunked_axis(value.type, self.axis, self.parts)
            sizes.append(size)
            # Pieces that take turns are all alike; one after the other, each has its own size.
            is_uneven = self.parts > 1 and size != sizes[0]
            if is_uneven or _resized(value.type, axis, sizes[0]) != first:
                raise InputError(
                    "joined chunks must have one type", expected=str(first), found=str(value.type)
                )
        return _resized(first, axis_of(first, self.axis), sum(sizes))

    def meaning(self, *chunks: Array) -> Array:
        axes, number = chunks[0].axes, chunks[0].axes.index(self.axis)
        if self.parts == 1:
            return Array(np.concatenate([c.to(axes) for c in chunks], number), axes)
        data, size = chunks[0].data, chunks[0].size(self.axis)
        before, after = data.shape[:number], data.shape[number + 1 :]
        cells = [c.data.reshape(*before, self.parts, size // self.parts, *after) for c in chunks]
        joined = np.stack(cells, number + 1).reshape(*before, size * len(chunks), *after)
        return Array(joined, axes)

    def term(self, algebra: Algebra, *chunks: Tensor) -> Tensor:
        if self.parts == 1:
            return terms.pieces(chunks, self.axis)
        return self.in_turns(algebra, chunks)

    def in_turns(self, algebra: Algebra, chunks: Sequence[Tensor]) -> Tensor:
        """Return chunks of one size, of which a piece each is in every part."""
        size = chunks[0].axis(self.axis).size
        assert isinstance(size, int), "the type is checked"
        piece, count = size // self.parts, len(chunks)
        new = algebra.axis(self.axis, size * count)
        position = terms.quotient(algebra, algebra.index(new), piece)
        part = terms.quotient(algebra, position, count)
        inner = terms.remainder(algebra, algebra.index(new), piece)
        at = algebra.add(algebra.scale(part, piece), inner)
        bodies = [
            terms.remainder(algebra, position, count),
            *(c.at({self.axis: at}) for c in chunks),
        ]
        axes = tuple(new if v.name == self.axis else v for v in chunks[0].axes)
        return Tensor(algebra, axes, algebra.apply(Head("stack", (count,)), (), bodies))


@operation(
    "update_slice",
    "x update start",
    linear=(0, 1),
    jointly=True,
    homogeneous=powers(None, None, None),
    sharding=by_name,
)
class UpdateSliceOp(AlongAxisOp):
    """x with a range along one axis replaced by the update, from `start` on.

    A start that would lead past the end is moved back until the update fits, and one below 0
    is 0, as XLA does.  A cache of keys and values is written so.
    """

    def infer(self, x_value: Operand, update_value: Operand, start_value: Operand) -> TensorType:
        x, update, start = (v.type for v in (x_value, update_value, start_value))
        axis, part = axis_of(x, self.axis), axis_of(update, self.axis, "the update")
        for type in (x, update):
            no_ragged(type, (axis.name,), "cannot replace a range")
        need_kind(start, "int", "the start")
        expected = x.with_axes(part if a is axis else a for a in x.axes)
        if start.axes or x.dtype != update.dtype or set(expected.axes) != set(update.axes):
            raise InputError(
                "the update has the axes of what it is written into, and starts at one index",
                expected=f"{expected}, i32[]",
                found=f"{update}, {start}",
            )
        if isinstance(axis.size, int) and isinstance(part.size, int) and part.size > axis.size:
            raise InputError(
                "the update is longer than the axis", found=f"{part}", expected=f"{axis}"
            )
        return x

    def meaning(self, x: Array, update: Array, start: Array) -> Array:
        size, number = update.size(self.axis), x.axes.index(self.axis)
        first = min(max(int(start.data), 0), x.size(self.axis) - size)
        data = np.moveaxis(x.data.copy(), number, 0)
        data[first : first + size] = update.to((self.axis, *(a for a in x.axes if a != self.axis)))
        return Array(np.moveaxis(data, 0, number), x.axes)
