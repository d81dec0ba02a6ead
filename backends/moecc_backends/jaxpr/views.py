"""A leaf of the parameters as an equation sees it: sliced, reshaped, cut from a stack.

A view is a chain of moves on a leaf.  Orders of axes, casts and repetitions along new axes are not
among them: axes have names here, so these change only which dimension of the array is which axis.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

from moecc.types import DTYPES, Axis, DType, TensorType
from moecc.weights.expr import Box, Expr, Source
from moecc.weights.movement import Index, Merge, Permute, Slice, Split

Iteration = Mapping[Hashable, int]
"""The number of the iteration of each loop."""


class NotABlock(Exception):
    """Why a part of a program is not a block: the reason of a near miss."""


def dtype_named(dtype: Any) -> DType | None:
    """Return an element type of NumPy's as the IR has it, or None."""
    return next((d for d in DTYPES.values() if d.numpy == dtype and d.kind != "key"), None)


@dataclass(frozen=True)
class TreeLeaf:
    """A leaf of the parameters: its name from the path in the tree, and its type.

    Attributes:
      name: ``layers.0.mlp.up``.
      shape: its shape.
      dtype: its element type.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of its axes."""
        return tuple(f"d{i}" for i in range(len(self.shape)))

    @property
    def source(self) -> Source:
        """The leaf as a weight expression."""
        return Source(self.name, TensorType(self.dtype, tuple(map(Axis, self.axes, self.shape))))


class Move(NamedTuple):
    """One step from a leaf to a view of it.

    Attributes:
      kind: ``slice``, ``index``, ``each`` (a loop counts the index), ``split`` or ``merge``.
      axis: the axis it is about; of ``merge`` the new one.
      args: start and stop; the index; the loop; the parts; the merged axes.
    """

    kind: str
    axis: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class LeafView:
    """A leaf seen through moves.

    Attributes:
      leaf: the leaf.
      dims: the axis of each dimension of the array; None where it does not vary along it.
      sizes: the size of each remaining axis.
      moves: the moves on the leaf, in order.
      casts: the element types that it was cast to, in order.
    """

    leaf: TreeLeaf
    dims: tuple[str | None, ...]
    sizes: tuple[tuple[str, int], ...]
    moves: tuple[Move, ...] = ()
    casts: tuple[str, ...] = ()

    @classmethod
    def of(cls, leaf: TreeLeaf) -> LeafView:
        """Return the view of all of `leaf`."""
        return cls(leaf, leaf.axes, tuple(zip(leaf.axes, leaf.shape, strict=True)))

    @property
    def loops(self) -> tuple[Hashable, ...]:
        """The loops that pick a part of the leaf, outermost first."""
        return tuple(move.args[0] for move in self.moves if move.kind == "each")

    def with_dims(self, dims: Sequence[str | None]) -> LeafView:
        """Return this view with its axes along other dimensions."""
        return replace(self, dims=tuple(dims))

    def cast(self, dtype: str) -> LeafView:
        """Return this view in another element type."""
        return replace(self, casts=(*self.casts, dtype))

    def each(self, loop: Hashable) -> LeafView:
        """Return the view that iteration by iteration `loop` has of the first dimension."""
        axis, *dims = self.dims
        view = self if axis is None else self._moved(Move("each", axis, (loop,)), {axis: ()})
        return view.with_dims(dims)

    # The methods below change axes, and leave `dims` to the caller (`scopes.rearranged`).

    def sliced(self, axis: str, start: int, stop: int) -> tuple[LeafView, str]:
        """Return the part ``[start, stop)`` of an axis, which keeps its name."""
        parts = ((axis, stop - start),)
        return self._moved(Move("slice", axis, (start, stop)), {axis: parts}), axis

    def indexed(self, axis: str, index: int) -> LeafView:
        """Return one element of an axis, without the axis."""
        return self._moved(Move("index", axis, (index,)), {axis: ()})

    def regrouped(
        self, axes: Sequence[str | None], parts: Sequence[int]
    ) -> tuple[LeafView, tuple[str, ...]]:
        """Return the view with neighbouring axes joined and cut again, and the new names.

        Raises:
          NotABlock: it does not vary along one of them.
        """
        names = tuple(axis for axis in axes if axis is not None)
        if len(names) < len(axes):
            raise NotABlock("a reshape joins an axis with one that is repeated")
        view, axis = self, names[0]
        if len(names) > 1:
            axis = "x".join(names)
            merged = ((axis, prod(dict(self.sizes)[n] for n in names)),)
            replaced = {n: merged if n == names[0] else () for n in names}
            view = self._moved(Move("merge", axis, names), replaced)
        if len(parts) == 1:
            return view, (axis,)
        names = tuple(f"{axis}_{i}" for i in range(len(parts)))
        into = tuple(zip(names, parts, strict=True))
        return view._moved(Move("split", axis, into), {axis: into}), names

    def _moved(self, move: Move, replaced: Mapping[str, tuple[tuple[str, int], ...]]) -> LeafView:
        """Return the view after `move`, with some axes replaced by others."""
        sizes = (part for axis in self.sizes for part in replaced.get(axis[0], (axis,)))
        return replace(self, sizes=tuple(sizes), moves=(*self.moves, move))

    def box(self, iteration: Iteration | None = None) -> Box:
        """Return the part of the leaf that the view sees, or a box around it.

        Without an iteration it is the part that all iterations of loops see.
        """
        ends = {axis: (0, size) for axis, size in zip(self.leaf.axes, self.leaf.shape, strict=True)}
        uncut = set(ends)
        for kind, axis, args in self.moves:
            if kind == "merge" or axis not in uncut:
                uncut.difference_update(args)
                continue
            start, _ = ends[axis]
            if kind == "slice":
                ends[axis] = (start + args[0], start + args[1])
                continue
            uncut.discard(axis)
            index = args[0] if kind == "index" else (iteration or {}).get(args[0])
            if kind != "split" and index is not None:
                ends[axis] = (start + index, start + index + 1)
        return tuple(ends.values())

    def expression(self, iteration: Iteration) -> Expr:
        """Return the view as a weight expression, in one iteration of each loop."""
        expr: Expr = self.leaf.source
        for kind, axis, args in self.moves:
            if kind == "slice":
                expr = Slice(expr, axis, *args)
            elif kind == "split":
                expr = Split(expr, axis, args)
            elif kind == "merge":
                expr = _merged(expr, args, axis)
            else:
                expr = Index(expr, axis, args[0] if kind == "index" else iteration[args[0]])
        return expr


def _merged(expr: Expr, axes: tuple[str, ...], name: str) -> Expr:
    """Return `expr` with `axes` merged where the first of them is."""
    names = expr.type.names
    remaining = [n for n in names if n not in axes]
    before = len([n for n in names[: names.index(axes[0])] if n not in axes])
    order = (*remaining[:before], *axes, *remaining[before:])
    return Merge(expr if order == names else Permute(expr, order), axes, name)


def reshape_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return which dimensions become which in a reshape: the smallest groups of equal products.

    Raises:
      NotABlock: a dimension is zero, so that products say nothing.
    """
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        before: list[int] = []
        after: list[int] = []
        if i < len(old):
            before, i = [i], i + 1
        if j < len(new) and (not before or old[before[0]] != 1 or new[j] == 1):
            after, j = [j], j + 1
        while (p := prod(old[n] for n in before)) != (q := prod(new[n] for n in after)):
            if i == len(old) and j == len(new):
                raise NotABlock("an array without elements is reshaped")
            if (p < q and i < len(old)) or j == len(new):
                before.append(i)
                i += 1
            else:
                after.append(j)
                j += 1
        groups.append((before, after))
    return groups
