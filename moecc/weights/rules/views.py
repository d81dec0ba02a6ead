"""Rules that push index and slice down to the tensors and the random streams."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from moecc.types.tensor import Axis
from moecc.weights.arithmetic import Add, Cast, Minimum, Moment, Mul, Scale, Select
from moecc.weights.expr import Expr, Full
from moecc.weights.movement import (
    Concat,
    Index,
    Merge,
    Permute,
    Rename,
    Slice,
    Split,
    Stack,
    Tile,
)

View = Index | Slice


def drop_slice(e: Slice) -> Expr | None:
    """Drop a slice of all positions."""
    return e.x if e.type == e.x.type else None


def push_index(e: Index) -> Expr | None:
    """Move an index below its operand."""
    push = _PUSH_INDEX.get(e.x.__class__)
    return push(e, e.x) if push else None


def push_slice(e: Slice) -> Expr | None:
    """Move a slice below its operand."""
    push = _PUSH_SLICE.get(e.x.__class__)
    return push(e, e.x) if push else None


def reorder(e: View, simplify: Callable[[Expr], Expr]) -> Expr | None:
    """Order views of several axes: slices first, each in the order of the axes.

    The outer view is pushed instead if it can go deeper than the inner one, as `simplify` shows.
    """
    inner = e.x
    if not isinstance(inner, View) or inner.axis == e.axis:
        return None
    alone = _again(e, inner.x)
    pushed = simplify(alone)
    if pushed is alone and _order(e) > _order(inner):
        return None
    return _again(inner, pushed)


def _order(e: View) -> tuple[bool, int]:
    base = e.x
    while isinstance(base, View):
        base = base.x
    return isinstance(e, Index), base.type.names.index(e.axis)


def _again(e: View, x: Expr) -> Expr:
    """Return the view `e` of `x`, or `x` if it has no such axis."""
    if e.axis not in x.type:
        return x
    return Index(x, e.axis, e.at) if isinstance(e, Index) else Slice(x, e.axis, e.start, e.stop)


def renamed(x: Expr, old: str, new: str) -> Expr:
    """Return `x` with an axis renamed, if the names differ."""
    return x if old == new else Rename(x, old, new)


# --- shared by both


def _below(e: View, inner: Expr) -> Expr:
    """Move a view to all operands that have its axis."""
    made = inner.with_operands(*(_again(e, x) for x in inner.operands))
    # The largest operand, which determines the order of the axes, may have changed.
    return made if made.type.names == e.type.names else Permute(made, e.type.names)


def _rename(e: View, inner: Rename) -> Expr:
    if e.axis != inner.new:
        return Rename(_again(e, inner.x), inner.old, inner.new)
    if isinstance(e, Index):
        return Index(inner.x, inner.old, e.at)
    return Rename(Slice(inner.x, inner.old, e.start, e.stop), inner.old, inner.new)


def _full(e: View, inner: Full) -> Expr:
    return Full(inner.value, e.type)


def _moved(e: View, inner: Split | Merge) -> Expr:
    """Move a view of an axis that a split or merge does not touch."""
    return inner.with_operands(_again(e, inner.x))


# --- index


def _index_tile(e: Index, inner: Tile) -> Expr:
    if e.axis == inner.axis:
        return inner.x
    position = inner.position - (e.x.type.names.index(e.axis) < inner.position)
    return Tile(_again(e, inner.x), inner.axis, inner.size, position)


def _index_stack(e: Index, inner: Stack) -> Expr:
    if e.axis == inner.axis:
        return inner.xs[e.at]
    position = inner.position - (e.x.type.names.index(e.axis) < inner.position)
    return Stack(tuple(_again(e, x) for x in inner.xs), inner.axis, position)


def _index_concat(e: Index, inner: Concat) -> Expr:
    if e.axis != inner.axis:
        return Concat(tuple(_again(e, x) for x in inner.xs), inner.axis)
    at = e.at
    for x in inner.xs:
        if at < _size(x, e.axis):
            return Index(x, e.axis, at)
        at -= _size(x, e.axis)
    raise AssertionError("an index lies within the parts")


def _index_slice(e: Index, inner: Slice) -> Expr | None:
    return Index(inner.x, e.axis, inner.start + e.at) if e.axis == inner.axis else None


def _index_permute(e: Index, inner: Permute) -> Expr:
    return Permute(_again(e, inner.x), tuple(n for n in inner.order if n != e.axis))


def _index_split(e: Index, inner: Split) -> Expr | None:
    names = [name for name, _ in inner.into]
    if e.axis not in names:
        return _moved(e, inner)
    sizes = [size for _, size in inner.into]
    at = names.index(e.axis)
    if prod(sizes[:at]) > 1:
        return None  # a strided range, which slice cannot express
    run = prod(sizes[at + 1 :])
    x = Slice(inner.x, inner.axis, e.at * run, (e.at + 1) * run)
    return Split(x, inner.axis, inner.into[:at] + inner.into[at + 1 :])


def _index_merge(e: Index, inner: Merge) -> Expr:
    if e.axis != inner.into:
        return _moved(e, inner)
    x, at = inner.x, e.at
    for name in reversed(inner.axes):
        at, here = divmod(at, _size(inner.x, name))
        x = Index(x, name, here)
    return x


def _index_moment(e: Index, inner: Moment) -> Expr:
    mask = _again(e, inner.mask) if inner.mask is not None else None
    keep = tuple(name for name in inner.keep if name != e.axis)
    return Moment(inner.kind, _again(e, inner.x), mask, keep)


# --- slice


def _slice_tile(e: Slice, inner: Tile) -> Expr:
    if e.axis == inner.axis:
        return Tile(inner.x, inner.axis, e.stop - e.start, inner.position)
    return inner.with_operands(_again(e, inner.x))


def _slice_stack(e: Slice, inner: Stack) -> Expr:
    if e.axis == inner.axis:
        return Stack(inner.xs[e.start : e.stop], inner.axis, inner.position)
    return _below(e, inner)


def _slice_concat(e: Slice, inner: Concat) -> Expr:
    if e.axis != inner.axis:
        return _below(e, inner)
    parts: list[Expr] = []
    offset = 0
    for x in inner.xs:
        size = _size(x, e.axis)
        start, stop = max(e.start - offset, 0), min(e.stop - offset, size)
        if start < stop:
            parts.append(Slice(x, e.axis, start, stop))
        offset += size
    return Concat(tuple(parts), inner.axis)


def _slice_slice(e: Slice, inner: Slice) -> Expr | None:
    if e.axis != inner.axis:
        return None
    return Slice(inner.x, e.axis, inner.start + e.start, inner.start + e.stop)


def _slice_split(e: Slice, inner: Split) -> Expr | None:
    names = [name for name, _ in inner.into]
    if e.axis not in names:
        return _moved(e, inner)
    sizes = [size for _, size in inner.into]
    at = names.index(e.axis)
    if prod(sizes[:at]) > 1:
        return None
    run = prod(sizes[at + 1 :])
    x = Slice(inner.x, inner.axis, e.start * run, e.stop * run)
    into = (*inner.into[:at], (e.axis, e.stop - e.start), *inner.into[at + 1 :])
    return Split(x, inner.axis, into)


def _slice_merge(e: Slice, inner: Merge) -> Expr | None:
    if e.axis != inner.into:
        return _moved(e, inner)
    first, *rest = inner.axes
    run = prod(_size(inner.x, name) for name in rest)
    if e.start % run == 0 and e.stop % run == 0:
        x = Slice(inner.x, first, e.start // run, e.stop // run)
        return Merge(x, inner.axes, inner.into)
    row = e.start // run
    if row != (e.stop - 1) // run:
        return None  # the range starts or ends within a row
    one = Merge(Index(inner.x, first, row), tuple(rest), inner.into)
    return Slice(one, e.axis, e.start - row * run, e.stop - row * run)


def _slice_moment(e: Slice, inner: Moment) -> Expr:
    mask = _again(e, inner.mask) if inner.mask is not None else None
    return Moment(inner.kind, _again(e, inner.x), mask, inner.keep)


def _size(x: Expr, name: str) -> int:
    axis: Axis = x.type[name]
    assert isinstance(axis.size, int)
    return axis.size


_BOTH: dict[type[Expr], Callable[[Any, Any], Expr | None]] = {
    Rename: _rename,
    Full: _full,
    Scale: _below,
    Cast: _below,
    Add: _below,
    Mul: _below,
    Minimum: _below,
    Select: _below,
}
_PUSH_INDEX = _BOTH | {
    Tile: _index_tile,
    Stack: _index_stack,
    Concat: _index_concat,
    Slice: _index_slice,
    Permute: _index_permute,
    Split: _index_split,
    Merge: _index_merge,
    Moment: _index_moment,
}
_PUSH_SLICE = _BOTH | {
    Permute: _below,
    Tile: _slice_tile,
    Stack: _slice_stack,
    Concat: _slice_concat,
    Slice: _slice_slice,
    Split: _slice_split,
    Merge: _slice_merge,
    Moment: _slice_moment,
}
