"""Equations that only change how an array is seen: what they make of a view of a leaf."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax.numpy as jnp

from moecc_backends.islands.jaxprs import float_bits
from moecc_backends.islands.views import View

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
