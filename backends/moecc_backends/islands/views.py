"""A leaf of the parameters as an equation sees it: sliced, reshaped, cut from a stack.

A view is a chain of steps on a leaf.  Orders of axes, casts and repetitions along new axes are not
among them: axes have names here, so these change only which dimension of the array is which axis.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from moecc.types import DTYPES, Axis, DType, TensorType
from moecc.weights.expr import Expr, Source
from moecc.weights.movement import Index, Merge, Permute, Slice, Split

Dims = tuple[str | None, ...]
"""The axis of each dimension of an array; None where it does not vary along it."""


@dataclass(frozen=True)
class Leaf:
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
        sizes = zip(self.axes, self.shape, strict=True)
        return Source(self.name, TensorType(self.dtype, tuple(Axis(n, s) for n, s in sizes)))


@dataclass(frozen=True)
class Step:
    """One step of a view: ``slice``, ``index``, ``each``, ``split`` or ``merge`` of an axis.

    Attributes:
      kind: which.
      axis: the axis it is about; of ``merge`` the new one.
      args: start and stop; the index; the loop that counts it; the parts; the axes merged.
    """

    kind: str
    axis: str
    args: tuple[Hashable, ...]


@dataclass(frozen=True)
class View:
    """A leaf seen through steps.

    Attributes:
      leaf: the leaf.
      dims: the axes by dimension of the array.
      sizes: the size of each axis that is left.
      steps: what is done to the leaf, in order.
      casts: the element types that it was cast to, in order.
    """

    leaf: Leaf
    dims: Dims
    sizes: tuple[tuple[str, int], ...]
    steps: tuple[Step, ...] = ()
    casts: tuple[str, ...] = ()

    @classmethod
    def whole(cls, leaf: Leaf) -> View:
        """Return the view of all of `leaf`."""
        return cls(leaf, leaf.axes, tuple(zip(leaf.axes, leaf.shape, strict=True)))

    def size(self, axis: str) -> int:
        """Return the size of an axis."""
        return dict(self.sizes)[axis]

    @property
    def loops(self) -> tuple[Hashable, ...]:
        """The loops that pick a part of the leaf, outermost first."""
        return tuple(s.args[0] for s in self.steps if s.kind == "each")

    def with_dims(self, dims: Dims) -> View:
        """Return this view with its axes along other dimensions."""
        return replace(self, dims=dims)

    def cast(self, dtype: str) -> View:
        """Return this view in another element type."""
        return replace(self, casts=(*self.casts, dtype))

    def sliced(self, axis: str, start: int, stop: int) -> View:
        """Return the part ``[start, stop)`` of an axis."""
        if (start, stop) == (0, self.size(axis)):
            return self
        sizes = tuple((n, stop - start if n == axis else s) for n, s in self.sizes)
        return self._then(Step("slice", axis, (start, stop)), self.dims, sizes)

    def indexed(self, axis: str, at: int) -> View:
        """Return one element of an axis, without the axis; its dimension is taken out."""
        return self._without(axis, Step("index", axis, (at,)))

    def each(self, dimension: int, loop: Hashable) -> View:
        """Return what iteration by iteration `loop` sees of the axis at `dimension`."""
        axis = self.dims[dimension]
        if axis is None:
            return self.with_dims((*self.dims[:dimension], *self.dims[dimension + 1 :]))
        return self._without(axis, Step("each", axis, (loop,)))

    def split(self, axis: str, parts: tuple[int, ...]) -> tuple[View, tuple[str, ...]]:
        """Return the view with an axis cut into axes of the sizes `parts`, and their names.

        The dimension of the axis becomes as many dimensions.
        """
        names = tuple(f"{axis}_{i}" for i in range(len(parts)))
        into = tuple(zip(names, parts, strict=True))
        at = self.dims.index(axis)
        dims = (*self.dims[:at], *names, *self.dims[at + 1 :])
        where = [n for n, _ in self.sizes].index(axis)
        sizes = (*self.sizes[:where], *into, *self.sizes[where + 1 :])
        return self._then(Step("split", axis, into), dims, sizes), names

    def merged(self, axes: tuple[str, ...]) -> tuple[View, str]:
        """Return the view with axes of neighbouring dimensions as one, and its name."""
        name = "x".join(axes)
        at = self.dims.index(axes[0])
        dims = (*self.dims[:at], name, *self.dims[at + len(axes) :])
        left = [(n, s) for n, s in self.sizes if n not in axes]
        where = [n for n, _ in self.sizes].index(axes[0])
        before = len([n for n, _ in self.sizes[:where] if n not in axes])
        left.insert(before, (name, prod(self.size(n) for n in axes)))
        return self._then(Step("merge", name, axes), dims, tuple(left)), name

    def expression(self, at: Mapping[Hashable, int]) -> Expr:
        """Return the view as a weight expression, in the iterations `at` of loops."""
        made: Expr = self.leaf.source
        for step in self.steps:
            made = _apply(made, step, at)
        return made

    def _without(self, axis: str, step: Step) -> View:
        dims = tuple(n for n in self.dims if n != axis)
        return self._then(step, dims, tuple((n, s) for n, s in self.sizes if n != axis))

    def _then(self, step: Step, dims: Dims, sizes: tuple[tuple[str, int], ...]) -> View:
        return replace(self, dims=dims, sizes=sizes, steps=(*self.steps, step))


def _apply(made: Expr, step: Step, at: Mapping[Hashable, int]) -> Expr:
    args = step.args
    if step.kind == "slice":
        start, stop = args
        assert isinstance(start, int)
        assert isinstance(stop, int)
        return Slice(made, step.axis, start, stop)
    if step.kind == "split":
        return Split(made, step.axis, tuple(args))  # type: ignore[arg-type]
    if step.kind == "merge":
        axes = tuple(str(a) for a in args)
        first = made.type.names.index(axes[0])
        rest = [n for n in made.type.names if n not in axes]
        before = len([n for n in made.type.names[:first] if n not in axes])
        order = (*rest[:before], *axes, *rest[before:])
        return Merge(made if order == made.type.names else Permute(made, order), axes, step.axis)
    index = args[0] if step.kind == "index" else at[args[0]]
    assert isinstance(index, int)
    return Index(made, step.axis, index)


def dtype_named(dtype: Any) -> DType | None:
    """Return an element type of NumPy's as the IR has it, or None."""
    return next((d for d in DTYPES.values() if d.numpy == dtype and d.kind != "key"), None)
