"""Rewrites an expression into a simpler one with the same bytes and the same type.

An ordered list of rules for each kind of node, applied until none matches.  They move an `Index` or
a `Slice` down to the tensors and random streams, so that only the requested part is read or drawn;
they compute before data are copied or axes change; and they drop no-ops.  Every rule is exact under
rounding: two scalings are merged only where that is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from math import frexp, isfinite, prod
from typing import Any

from moecc.types import Axis, TensorType, is_lossless
from moecc.weights.arithmetic import Add, Cast, Minimum, Moment, Mul, Scale, Select
from moecc.weights.draws import Normal, Subset, TruncatedNormal, Uniform
from moecc.weights.expr import Expr, Full
from moecc.weights.movement import Concat, Index, Merge, Permute, Rename, Slice, Split, Stack, Tile

# Rules for arithmetic nodes: only those that rounding cannot distinguish.
#
# What needs numpy, which takes longer to import than the rest of moecc, is in
# `moecc.weights.arithmetic`, imported where there is a number to compute.


def under_movement(e: Scale | Cast) -> Expr | None:
    """Compute before data are copied or axes change."""
    x = e.x
    if not isinstance(x, Tile | Permute | Rename | Split | Merge):
        return None
    return x.with_operands(e.with_operands(x.x))


def drop_widening(e: Scale | Add | Mul | Minimum | Moment) -> Expr | None:
    """Drop a cast that widens an operand, which arithmetic does anyway."""
    narrowed = e.with_operands(*map(_narrow, e.operands))
    return narrowed if narrowed is not e and narrowed.type == e.type else None


def _narrow(x: Expr) -> Expr:
    return x.x if isinstance(x, Cast) and is_lossless(x.x.type.dtype, x.dtype) else x


def fold_numbers(e: Scale | Cast | Add | Mul | Minimum) -> Expr | None:
    """Fold operations on constant tensors."""
    if not all(isinstance(x, Full) for x in e.operands):
        return None
    from moecc.weights.arithmetic import compute_constant as computed

    value = computed(e, [x for x in e.operands if isinstance(x, Full)])
    return Full(value, e.type) if isfinite(value) else None


def scale_by_one(e: Scale) -> Expr | None:
    """Widen, if the factor is 1."""
    return Cast(e.x, e.type.dtype) if e.factor == 1.0 else None


def scale_of_scale(e: Scale) -> Expr | None:
    """Scale once, where the first factor is a power of two of at least 1.

    Multiplying by it is exact, or overflows, which is an error.  A smaller factor may round a
    subnormal.
    """
    inner = e.x
    if not isinstance(inner, Scale) or abs(frexp(inner.factor)[0]) != 0.5:
        return None
    from moecc.weights.arithmetic import rounded

    dtype = e.type.dtype
    factor = inner.factor * rounded(e.factor, dtype)
    if abs(inner.factor) < 1.0 or not isfinite(rounded(factor, dtype)):
        return None
    return Scale(inner.x, factor)


def drop_cast(e: Cast) -> Expr | None:
    """Drop a cast to the same type."""
    return e.x if e.dtype is e.x.type.dtype else None


def cast_of_cast(e: Cast) -> Expr | None:
    """Cast once, if the first cast is lossless."""
    inner = e.x
    if not isinstance(inner, Cast) or not is_lossless(inner.x.type.dtype, inner.dtype):
        return None
    return Cast(inner.x, e.dtype)


def mul_by_full(e: Mul) -> Expr | None:
    """Scale by a constant tensor."""
    for x, full in ((e.a, e.b), (e.b, e.a)):
        if isinstance(full, Full):
            from moecc.weights.arithmetic import value_of

            scaled = Scale(x, value_of(full))
            if scaled.type == e.type:
                return scaled
    return None


def select_constant(e: Select) -> Expr | None:
    """Select the branch of a constant mask."""
    chosen = e.a if e.a is e.b else None
    if isinstance(e.mask, Full):
        chosen = e.a if e.mask.value else e.b
    if chosen is None or chosen.type.axes != e.type.axes:
        return None
    return chosen if chosen.type.dtype is e.type.dtype else Cast(chosen, e.type.dtype)


def moment_of_all(e: Moment) -> Expr | None:
    """Drop a constant true mask."""
    if isinstance(e.mask, Full) and e.mask.value:
        return Moment(e.kind, e.x, None, e.keep)
    return None


# Rules that push index and slice down to the tensors and the random streams.

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
    viewed = inner.with_operands(*(_again(e, x) for x in inner.operands))
    # The largest operand, which determines the order of the axes, may have changed.
    return viewed if viewed.type.names == e.type.names else Permute(viewed, e.type.names)


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
    first, *inner_axes = inner.axes
    run = prod(_size(inner.x, name) for name in inner_axes)
    if e.start % run == 0 and e.stop % run == 0:
        x = Slice(inner.x, first, e.start // run, e.stop // run)
        return Merge(x, inner.axes, inner.into)
    row = e.start // run
    if row != (e.stop - 1) // run:
        return None  # the range starts or ends within a row
    merged = Merge(Index(inner.x, first, row), tuple(inner_axes), inner.into)
    return Slice(merged, e.axis, e.start - row * run, e.stop - row * run)


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


# Rules for the nodes that move data.


def fold_full(e: Tile | Split | Merge | Permute) -> Expr | None:
    """Create the constant tensor with the result type."""
    return Full(e.x.value, e.type) if isinstance(e.x, Full) else None


# --- tile, stack, concat


def rename_over_tile(e: Tile) -> Expr | None:
    """Rename after tiling."""
    inner = e.x
    if not isinstance(inner, Rename) or inner.old == e.axis:
        return None
    return Rename(Tile(inner.x, e.axis, e.size, e.position), inner.old, inner.new)


def same_operands(e: Stack) -> Expr | None:
    """Tile instead of stacking equal operands."""
    if any(x is not e.xs[0] for x in e.xs):
        return None
    return Tile(e.xs[0], e.axis, len(e.xs), e.position)


def stack_of_indices(e: Stack) -> Expr | None:
    """Slice instead of stacking consecutive positions."""
    first = e.xs[0]
    if not isinstance(first, Index):
        return None
    for i, x in enumerate(e.xs):
        if x is not _index_at(first, first.at + i):
            return None
    x = Slice(first.x, first.axis, first.at, first.at + len(e.xs))
    return Permute(renamed(x, first.axis, e.axis), e.type.names)


def _index_at(e: Index, at: int) -> Expr | None:
    axis = e.x.type[e.axis]
    assert isinstance(axis.size, int)
    return Index(e.x, e.axis, at) if at < axis.size else None


def same_fulls(e: Concat) -> Expr | None:
    """Create the constant tensor with the result type."""
    if not all(isinstance(x, Full) for x in e.xs):
        return None
    values = {x.value.hex() for x in e.xs if isinstance(x, Full)}
    return Full(float.fromhex(values.pop()), e.type) if len(values) == 1 else None


def flatten_concat(e: Concat) -> Expr | None:
    """Flatten nested concatenations; one operand is returned as it is."""
    if len(e.xs) == 1:
        return e.xs[0]
    parts: list[Expr] = []
    for x in e.xs:
        parts.extend(x.xs if isinstance(x, Concat) and x.axis == e.axis else (x,))
    return Concat(tuple(parts), e.axis) if len(parts) > len(e.xs) else None


def concat_of_slices(e: Concat) -> Expr | None:
    """Join consecutive slices of one expression."""
    parts = [e.xs[0]]
    for x in e.xs[1:]:
        last = parts[-1]
        if (
            isinstance(x, Slice)
            and isinstance(last, Slice)
            and x.axis == last.axis == e.axis
            and x.x is last.x
            and x.start == last.stop
        ):
            parts[-1] = Slice(x.x, e.axis, last.start, x.stop)
        else:
            parts.append(x)
    return Concat(tuple(parts), e.axis) if len(parts) < len(e.xs) else None


# --- split, merge


def trivial_split(e: Split) -> Expr | None:
    """Rename instead of splitting into one axis."""
    return renamed(e.x, e.axis, e.into[0][0]) if len(e.into) == 1 else None


def split_of_split(e: Split) -> Expr | None:
    """Split once."""
    inner = e.x
    if not isinstance(inner, Split) or e.axis not in dict(inner.into):
        return None
    at = [name for name, _ in inner.into].index(e.axis)
    return Split(inner.x, inner.axis, (*inner.into[:at], *e.into, *inner.into[at + 1 :]))


def split_of_merge(e: Split) -> Expr | None:
    """Undo a merge of axes of the requested sizes."""
    inner = e.x
    if not isinstance(inner, Merge) or e.axis != inner.into:
        return None
    sizes = tuple(inner.x.type[name].size for name in inner.axes)
    if sizes != tuple(size for _, size in e.into):
        return None
    return rename_all(inner.x, e.type.names)


def split_of_rename(e: Split) -> Expr | None:
    """Split under the original name."""
    inner = e.x
    if not isinstance(inner, Rename) or e.axis != inner.new:
        return None
    return Split(inner.x, inner.old, e.into)


def trivial_merge(e: Merge) -> Expr | None:
    """Rename instead of merging one axis."""
    return renamed(e.x, e.axes[0], e.into) if len(e.axes) == 1 else None


def merge_of_split(e: Merge) -> Expr | None:
    """Split into fewer axes."""
    inner = e.x
    if not isinstance(inner, Split) or not set(e.axes) <= set(dict(inner.into)):
        return None
    at = [name for name, _ in inner.into].index(e.axes[0])
    size = e.type[e.into].size
    assert isinstance(size, int)
    inner_axes = inner.into[at + len(e.axes) :]
    return Split(inner.x, inner.axis, (*inner.into[:at], (e.into, size), *inner_axes))


def merge_of_merge(e: Merge) -> Expr | None:
    """Merge once."""
    inner = e.x
    if not isinstance(inner, Merge) or inner.into not in e.axes:
        return None
    at = e.axes.index(inner.into)
    return Merge(inner.x, (*e.axes[:at], *inner.axes, *e.axes[at + 1 :]), e.into)


def merge_of_rename(e: Merge) -> Expr | None:
    """Merge under the original names."""
    inner = e.x
    if not isinstance(inner, Rename) or inner.new not in e.axes:
        return None
    axes = tuple(inner.old if name == inner.new else name for name in e.axes)
    return Merge(inner.x, axes, e.into)


# --- rename, permute


def drop_rename(e: Rename) -> Expr | None:
    """Drop a rename to the same name."""
    return e.x if e.old == e.new else None


def absorb_rename(e: Rename) -> Expr | None:
    """Name the axis where it is created."""
    x = e.x
    if isinstance(x, Tile) and x.axis == e.old:
        return Tile(x.x, e.new, x.size, x.position)
    if isinstance(x, Stack) and x.axis == e.old:
        return Stack(x.xs, e.new, x.position)
    if isinstance(x, Split) and e.old in dict(x.into):
        return Split(x.x, x.axis, tuple((e.new if n == e.old else n, s) for n, s in x.into))
    if isinstance(x, Merge) and x.into == e.old:
        return Merge(x.x, x.axes, e.new)
    return _retyped(x, e.type, e.old, e.new)


def _retyped(x: Expr, type: TensorType, old: str, new: str) -> Expr | None:
    """Rename an axis of a leaf that is not a checkpoint tensor."""
    if isinstance(x, Full):
        return Full(x.value, type)
    if isinstance(x, Normal):
        return Normal(type, x.std, x.key, x.mean)
    if isinstance(x, TruncatedNormal):
        return TruncatedNormal(type, x.std, x.key, x.bound)
    if isinstance(x, Uniform):
        return Uniform(type, x.low, x.high, x.key)
    if isinstance(x, Subset):
        return Subset(type, new if x.axis == old else x.axis, x.count, x.key)
    return None


def chain_of_renames(e: Rename) -> Expr | None:
    """Rename each axis at most once, in the order of the axes."""
    base = e.x
    if not isinstance(base, Rename):
        return None
    while isinstance(base, Rename):
        base = base.x
    return rename_all(base, e.type.names)


def rename_all(x: Expr, names: tuple[str, ...]) -> Expr:
    """Return `x` with its axes named `names`, with as few renames as possible."""
    pending = [(old, new) for old, new in zip(x.type.names, names, strict=True) if old != new]
    while pending:
        free = next((pair for pair in pending if pair[1] not in x.type), None)
        if free is not None:
            x = Rename(x, *free)
            pending.remove(free)
            continue
        # The names form a cycle: one of them gets a temporary name.
        old, new = pending.pop(0)
        aside = next(name for i in count() if (name := f"aside{i}") not in {*x.type.names, *names})
        x = Rename(x, old, aside)
        pending.append((aside, new))
    return x


def drop_permute(e: Permute) -> Expr | None:
    """Drop a permutation to the same order."""
    return e.x if e.order == e.x.type.names else None


def permute_of_permute(e: Permute) -> Expr | None:
    """Permute once."""
    return Permute(e.x.x, e.order) if isinstance(e.x, Permute) else None


def permute_of_copies(e: Permute) -> Expr | None:
    """Permute first, then tile or stack at the new position."""
    x = e.x
    if not isinstance(x, Tile | Stack):
        return None
    order = tuple(name for name in e.order if name != x.axis)
    position = e.order.index(x.axis)
    if isinstance(x, Tile):
        return Tile(Permute(x.x, order), x.axis, x.size, position)
    return Stack(tuple(Permute(y, order) for y in x.xs), x.axis, position)


def permute_of_rename(e: Permute) -> Expr | None:
    """Rename after permuting."""
    x = e.x
    if not isinstance(x, Rename):
        return None
    order = tuple(x.old if name == x.new else name for name in e.order)
    return Rename(Permute(x.x, order), x.old, x.new)


Rule = Callable[[Any], Expr | None]


def _reorder(e: Index | Slice) -> Expr | None:
    return reorder(e, simplify)


RULES: dict[type[Expr], tuple[Rule, ...]] = {
    Index: (push_index, _reorder),
    Slice: (drop_slice, push_slice, _reorder),
    Tile: (fold_full, rename_over_tile),
    Stack: (same_operands, stack_of_indices),
    Concat: (same_fulls, flatten_concat, concat_of_slices),
    Split: (
        fold_full,
        trivial_split,
        split_of_split,
        split_of_merge,
        split_of_rename,
    ),
    Merge: (
        fold_full,
        trivial_merge,
        merge_of_split,
        merge_of_merge,
        merge_of_rename,
    ),
    Rename: (drop_rename, absorb_rename, chain_of_renames),
    Permute: (
        fold_full,
        drop_permute,
        permute_of_permute,
        permute_of_copies,
        permute_of_rename,
    ),
    Scale: (
        fold_numbers,
        scale_by_one,
        drop_widening,
        scale_of_scale,
        under_movement,
    ),
    Cast: (
        drop_cast,
        fold_numbers,
        cast_of_cast,
        under_movement,
    ),
    Add: (fold_numbers, drop_widening),
    Mul: (fold_numbers, mul_by_full, drop_widening),
    Minimum: (fold_numbers, drop_widening),
    Select: (select_constant,),
    Moment: (moment_of_all, drop_widening),
}


def simplify(expr: Expr) -> Expr:
    """Return the simplified expression, which has the same bytes."""
    passed: list[Expr] = []
    while (simple := getattr(expr, "_simple", None)) is None:
        passed.append(expr)
        simpler = _step(expr)
        if simpler is expr:
            break
        expr = simpler
    if isinstance(simple, Expr):
        expr = simple
    for e in passed:
        # A self-referencing expression would have to wait for the cyclic collector.
        e._set("_simple", True if e is expr else expr)
    return expr


def steps(expr: Expr) -> Iterator[tuple[str, Expr, Expr]]:
    """Yield what `simplify` does to an expression: the name of a rule, before and after it."""
    for operand in expr.operands:
        yield from steps(operand)
    below = expr.with_operands(*map(simplify, expr.operands))
    rewritten = _by_rule(below)
    if rewritten is not None:
        yield (rewritten[0].__name__, below, rewritten[1])
        yield from steps(rewritten[1])


def _step(expr: Expr) -> Expr:
    below = expr.with_operands(*map(simplify, expr.operands))
    if below is not expr:
        return below
    rewritten = _by_rule(expr)
    return expr if rewritten is None else rewritten[1]


def _by_rule(expr: Expr) -> tuple[Rule, Expr] | None:
    """Return the first rule that changes an expression, and what it makes of it."""
    for rule in RULES.get(expr.__class__, ()):
        rewritten = rule(expr)
        if rewritten is not None and rewritten is not expr:
            assert rewritten.type == expr.type, (
                f"{rule.__name__}: {expr} : {expr.type} to {rewritten.type}"
            )
            return rule, rewritten
    return None
