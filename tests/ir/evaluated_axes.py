"""Which elements and axes an operation reads, found by evaluating its meaning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from moecc.ir.arrays import Array, Data

from .operations import Function

TOLERANCE = 1e-9
STEP = 1e-4


def same(a: Data, b: Data, tolerance: float = TOLERANCE) -> bool:
    return a.shape == b.shape and np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def with_data(arrays: Sequence[Array], at: int, data: Data) -> list[Array]:
    return [replace(a, data=data) if i == at else a for i, a in enumerate(arrays)]


def floats_of(f: Function) -> list[int]:
    return [i for i, t in enumerate(f.types) if t.dtype.is_float]


def has_one_float(f: Function) -> bool:
    return len(f.node.results) == 1 and f.node.results[0].type.dtype.is_float


def other_data(f: Function, at: int, array: Array, seed: int) -> Data:
    """Return other data for an operand, all of it different where that can be."""
    if array.dtype is not None and array.dtype.kind == "bool":
        return ~array.data
    if array.assignment is not None:
        return np.full_like(array.data, -1)
    if f.types[at].dtype.kind == "int":
        data = f.draw(seed)[at].data
        return data[::-1].copy() if data.ndim else data + 1
    return f.draw(seed)[at].data


@cache
def is_elementwise(f: Function) -> bool:
    """Whether a result is one function of one element of each operand, everywhere."""
    kinds = {t.dtype.kind for t in f.types}
    if not f.types or "key" in kinds or len(f.node.results) > 1 or is_identity_on_mesh(f):
        return False
    wide = max(f.types, key=len)
    if f.node.result.type.names != wide.names or f.node.result.type.sizes != wide.sizes:
        return False
    if not all(set(t.names) <= set(wide.names) for t in f.types):
        return False
    depends = all(reaches(f, i) for i in range(len(f.types)))
    return depends and not any(crosses(f, n) for n in wide.names)


def is_identity_on_mesh(f: Function) -> bool:
    one = f.draw(0)
    type = f.node.results[0].type
    changes = len(f.types) == 1 and str(type) != str(f.types[0]) and type.bare == f.types[0].bare
    return changes and same(f(one)[0].data, one[0].data)


def reaches(f: Function, at: int) -> bool:
    """Whether the operand has any influence on the results."""
    for seed in range(6):
        arrays = f.draw(seed)
        changed = with_data(arrays, at, other_data(f, at, arrays[at], seed + 50))
        if any(not same(a.data, b.data) for a, b in zip(f(arrays), f(changed), strict=True)):
            return True
    return False


def crosses(f: Function, axis: str) -> bool:
    """Whether elements meet along `axis`, or their places on it count."""
    return any(
        not _moves_along(f, axis, s) or any(_spreads(f, axis, i, s) for i in range(len(f.types)))
        for s in range(8)
    )


def taken(array: Array, axis: str, order: Sequence[int]) -> Array:
    """Return an array with the places of an axis in another order."""
    if axis not in array.axes:
        return array
    return replace(array, data=array.data.take(order, array.axes.index(axis)))


def _moves_along(f: Function, axis: str, seed: int) -> bool:
    """Whether operands in another order along `axis` give the results in that order."""
    arrays = f.draw(seed)
    size, *others = dict.fromkeys(a.size(axis) for a in arrays if axis in a.axes)
    if others:
        return False
    order = [*range(1, size), 0]
    moved = f([taken(a, axis, order) for a in arrays])
    return all(
        same(a.data, taken(b, axis, order).data) for a, b in zip(moved, f(arrays), strict=True)
    )


def _spreads(f: Function, axis: str, at: int, seed: int) -> bool:
    """Whether a change at the first position of `axis` is seen at others."""
    arrays = f.draw(seed)
    if axis not in arrays[at].axes or arrays[at].assignment is not None:
        return False
    data, where = arrays[at].data.copy(), arrays[at].axes.index(axis)
    index = tuple(0 if i == where else slice(None) for i in range(data.ndim))
    data[index] = other_data(f, at, arrays[at], seed + 50)[index]
    for before, after in zip(f(arrays), f(with_data(arrays, at, data)), strict=True):
        rest = range(1, before.size(axis)) if axis in before.axes else ()
        if not same(taken(before, axis, rest).data, taken(after, axis, rest).data):
            return True
    return False


@cache
def is_logical(f: Function) -> bool:
    """Whether truth values go in or out of an elementwise operation."""
    kinds = [t.dtype.kind for t in (*f.types, *(v.type for v in f.node.results))]
    return is_elementwise(f) and "bool" in kinds
