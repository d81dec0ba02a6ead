"""A leaf of the parameters as an equation sees it: sliced, reshaped, cut from a stack.

A view is a chain of steps on a leaf.  Orders of axes, casts and repetitions along new axes are not
among them: axes have names here, so these change only which dimension of the array is which axis.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol

import jax.numpy as jnp

from moecc.types import DTYPES, Axis, DType, TensorType
from moecc.weights.expr import Expr, Source
from moecc.weights.movement import Index, Merge, Permute, Slice, Split
from moecc_backends.jaxpr.jaxprs import float_bits

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


# Equations that only change how an array is seen: what they make of a view of a leaf.

Params = Mapping[str, Any]


class Seen(Protocol):
    """A value that may be a view of a leaf."""

    @property
    def view(self) -> View | None:
        """The view."""
        ...

    @property
    def const(self) -> Any:
        """Its value, where it is a constant."""
        ...

    @property
    def aval(self) -> Any:
        """Its shape and type."""
        ...


def views_through(name: str, params: Params, given: Sequence[Seen]) -> list[View | None]:
    """Return what an equation makes of a view; nothing where it is none after it."""
    view = given[0].view if given else None
    rule = _RULES.get(name)
    if view is None or rule is None:
        return []
    if not jnp.issubdtype(given[0].aval.dtype, jnp.floating):
        return []
    return list(rule(view, params, given))


def _same(view: View, params: Params, given: Sequence[Seen]) -> list[View | None]:
    return [view]


def _converted(view: View, params: Params, given: Sequence[Seen]) -> list[View | None]:
    dtype = params["new_dtype"]
    return [view.cast(str(jnp.dtype(dtype)))] if jnp.issubdtype(dtype, jnp.floating) else []


def _rounded(view: View, params: Params, given: Sequence[Seen]) -> list[View | None]:
    """The same where nothing is lost."""
    fraction, exponent = float_bits(given[0].aval.dtype)
    keeps = params["mantissa_bits"] >= fraction and params["exponent_bits"] >= exponent
    return [view] if keeps else []


def _transposed(view: View, params: Params, given: Sequence[Seen]) -> list[View | None]:
    return [view.with_dims(tuple(view.dims[i] for i in params["permutation"]))]


def _squeezed(view: View, params: Params, given: Sequence[Seen]) -> list[View | None]:
    gone = params["dimensions"]
    for dimension in gone:
        axis = view.dims[dimension]
        if axis is not None:
            # The dimensions of others must not move meanwhile.
            dims = view.dims
            view = view.indexed(axis, 0).with_dims(tuple(None if n == axis else n for n in dims))
    return [view.with_dims(tuple(n for i, n in enumerate(view.dims) if i not in gone))]


def _sliced(view: View, params: Params, given: Sequence[Seen]) -> list[View | None]:
    strides = params["strides"]
    if strides is not None and any(s != 1 for s in strides):
        return []
    return [_cut(view, params["start_indices"], params["limit_indices"])]


def _cut(view: View, starts: Sequence[int], stops: Sequence[int]) -> View:
    for axis, start, stop in zip(view.dims, starts, stops, strict=True):
        if axis is not None:
            view = view.sliced(axis, int(start), int(stop))
    return view


def _dynamically_sliced(view: View, params: Params, given: Sequence[Seen]) -> list[View | None]:
    """A slice whose start is written into the program."""
    try:
        starts = [int(v.const) for v in given[1:]]
    except TypeError:
        return []
    sizes, shape = params["slice_sizes"], given[0].aval.shape
    starts = [min(max(s, 0), n - k) for s, n, k in zip(starts, shape, sizes, strict=True)]
    return [_cut(view, starts, [s + k for s, k in zip(starts, sizes, strict=True)])]


def _split(view: View, params: Params, given: Sequence[Seen]) -> list[View | None]:
    axis = view.dims[params["axis"]]
    if axis is None:
        return [view for _ in params["sizes"]]
    parts: list[View | None] = []
    at = 0
    for size in params["sizes"]:
        parts.append(view.sliced(axis, at, at + int(size)))
        at += int(size)
    return parts


def _broadcast(view: View, params: Params, given: Sequence[Seen]) -> list[View | None]:
    shape, where = params["shape"], params["broadcast_dimensions"]
    dims: list[str | None] = [None] * len(shape)
    for old, new in enumerate(where):
        axis = view.dims[old]
        if axis is not None and view.size(axis) != shape[new]:
            left = view.dims
            view = view.indexed(axis, 0).with_dims(tuple(None if n == axis else n for n in left))
            axis = None
        dims[new] = axis
    return [view.with_dims(tuple(dims))]


def _reshaped(view: View, params: Params, given: Sequence[Seen]) -> list[View | None]:
    if params.get("dimensions") is not None:
        return []
    found = reshaped(view, given[0].aval.shape, params["new_sizes"])
    return [] if found is None else [found]


def reshaped(view: View, old: Sequence[int], new: Sequence[int]) -> View | None:
    """Return a view reshaped from `old` to `new`, or None if axes are cut in no simple way."""
    dims: list[str | None] = []
    before_all = view.dims
    for before, after in groups(old, new):
        wide = [i for i in before if old[i] != 1]
        names = tuple(before_all[i] for i in wide)
        axes = tuple(n for n in names if n is not None)
        if len(axes) < len(names):
            if [old[i] for i in before] != [new[j] for j in after]:
                return None
            dims += [before_all[i] for i in before]
            continue
        view = _without_ones(view, [before_all[i] for i in before if old[i] == 1])
        view, made = _regrouped(view, axes, tuple(new[j] for j in after if new[j] != 1))
        left = iter(made)
        dims += [next(left) if new[j] != 1 else None for j in after]
    return view.with_dims(tuple(dims))


def _without_ones(view: View, axes: Sequence[str | None]) -> View:
    """Return a view without axes of size one."""
    for axis in axes:
        if axis is not None:
            view = view.with_dims((axis,)).indexed(axis, 0)
    return view


def _regrouped(
    view: View, axes: tuple[str, ...], parts: tuple[int, ...]
) -> tuple[View, tuple[str, ...]]:
    """Return a view with neighbouring axes joined and cut again into `parts`, and their names."""
    if tuple(view.size(a) for a in axes) == parts:
        return view, axes
    if len(axes) > 1:
        view, axis = view.with_dims(axes).merged(axes)
        axes = (axis,)
    if len(parts) > 1:
        view, axes = view.with_dims(axes).split(axes[0], parts)
    return view, axes


def groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return which dimensions become which in a reshape: the smallest groups of equal products."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        before, after = [], []
        p = q = 1
        if i < len(old):
            before.append(i)
            p = old[i]
            i += 1
        if j < len(new) and (not before or p != 1 or new[j] == 1):
            after.append(j)
            q = new[j]
            j += 1
        while p != q:
            if p < q and i < len(old):
                before.append(i)
                p *= old[i]
                i += 1
            elif j < len(new):
                after.append(j)
                q *= new[j]
                j += 1
            else:
                before.append(i)
                p *= old[i]
                i += 1
        found.append((before, after))
    return found


_RULES: dict[str, Callable[[View, Params, Sequence[Seen]], list[View | None]]] = {
    "convert_element_type": _converted,
    "copy": _same,
    "copy_p": _same,
    "name": _same,
    "sharding_constraint": _same,
    "reduce_precision": _rounded,
    "pvary": _same,
    "pcast": _same,
    "transpose": _transposed,
    "squeeze": _squeezed,
    "slice": _sliced,
    "dynamic_slice": _dynamically_sliced,
    "split": _split,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshaped,
}

STRUCTURAL = frozenset(_RULES)
"""Primitives through which a weight stays a view of its leaf."""
