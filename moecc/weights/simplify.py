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

from moecc.types import is_lossless
from moecc.weights.arithmetic import (
    Add,
    Binary,
    Cast,
    Minimum,
    Moment,
    Mul,
    Scale,
    Select,
    compute_constant,
    rounded,
    value_of,
)
from moecc.weights.draws import Normal, Subset, TruncatedNormal, Uniform
from moecc.weights.expr import Expr, Full
from moecc.weights.movement import Concat, Index, Merge, Permute, Rename, Slice, Split, Stack, Tile

# Rules for arithmetic nodes: only those that rounding cannot distinguish.


def under_movement(e: Scale | Cast) -> Expr | None:
    """Compute before data are copied or axes change."""
    x = e.x
    if not isinstance(x, Tile | Permute | Rename | Split | Merge):
        return None
    return x.with_operands(e.with_operands(x.x))


def drop_widening(e: Scale | Binary | Moment) -> Expr | None:
    """Drop a cast that widens an operand, which arithmetic does anyway."""
    narrowed = e.with_operands(*map(_narrow, e.operands))
    return narrowed if narrowed is not e and narrowed.type == e.type else None


def _narrow(x: Expr) -> Expr:
    return x.x if isinstance(x, Cast) and is_lossless(x.x.type.dtype, x.dtype) else x


def fold_numbers(e: Scale | Cast | Binary) -> Expr | None:
    """Fold operations on constant tensors."""
    if not all(isinstance(x, Full) for x in e.operands):
        return None
    value = compute_constant(e, [x for x in e.operands if isinstance(x, Full)])
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


def reorder_views(e: View) -> Expr | None:
    """Order views of several axes: slices first, each in the order of the axes.

    The outer view is pushed instead if it can go deeper than the inner one.
    """
    inner = e.x
    if not isinstance(inner, View) or inner.axis == e.axis:
        return None
    alone = _viewed(e, inner.x)
    pushed = simplify(alone)
    if pushed is alone and _order(e) > _order(inner):
        return None
    return _viewed(inner, pushed)


def _order(e: View) -> tuple[bool, int]:
    base = e.x
    while isinstance(base, View):
        base = base.x
    return isinstance(e, Index), base.type.names.index(e.axis)


def _viewed(e: View, x: Expr) -> Expr:
    """Return the view `e` of `x`, or `x` if it has no such axis."""
    if e.axis not in x.type:
        return x
    return Index(x, e.axis, e.at) if isinstance(e, Index) else Slice(x, e.axis, e.start, e.stop)


def renamed(x: Expr, old: str, new: str) -> Expr:
    """Return `x` with an axis renamed, if the names differ."""
    return x if old == new else Rename(x, old, new)


def push_view(e: View) -> Expr | None:
    """Move an index or a slice below its operand."""
    x, axis, is_index = e.x, e.axis, isinstance(e, Index)
    start, stop = (e.at, e.at + 1) if isinstance(e, Index) else (e.start, e.stop)
    at = x.type.names.index(axis)
    match x:
        case Full():
            return Full(x.value, e.type)
        case Scale() | Cast() | Binary() | Select():
            below = x.with_operands(*(_viewed(e, y) for y in x.operands))
            # The largest operand, which determines the order of the axes, may have changed.
            return below if below.type.names == e.type.names else Permute(below, e.type.names)
        case Rename() if axis != x.new:
            return Rename(_viewed(e, x.x), x.old, x.new)
        case Rename():
            below = e.replace(x=x.x, axis=x.old)
            return below if is_index else Rename(below, x.old, x.new)
        case Tile() if axis == x.axis:
            return x.x if is_index else x.replace(size=stop - start)
        case Stack() if axis == x.axis:
            return x.xs[start] if is_index else x.replace(xs=x.xs[start:stop])
        case Tile():
            position = x.position - (is_index and at < x.position)
            return Tile(_viewed(e, x.x), x.axis, x.size, position)
        case Stack():
            position = x.position - (is_index and at < x.position)
            return Stack(tuple([_viewed(e, y) for y in x.xs]), x.axis, position)
        case Concat() if axis != x.axis:
            return x.with_operands(*(_viewed(e, y) for y in x.xs))
        case Concat():
            parts: list[Expr] = []
            offset = 0
            for y in x.xs:
                size = y.type[axis].fixed_size
                ends = max(start - offset, 0), min(stop - offset, size)
                if ends[0] < ends[1]:
                    parts.append(Index(y, axis, ends[0]) if is_index else Slice(y, axis, *ends))
                offset += size
            return parts[0] if is_index else Concat(tuple(parts), axis)
        case Slice() if axis == x.axis:
            first = x.start + start
            return Index(x.x, axis, first) if is_index else Slice(x.x, axis, first, x.start + stop)
        case Permute():
            return Permute(_viewed(e, x.x), tuple(n for n in x.order if n in e.type))
        case Moment():
            mask = _viewed(e, x.mask) if x.mask is not None else None
            keep = tuple(n for n in x.keep if n in e.type)
            return Moment(x.kind, _viewed(e, x.x), mask, keep)
        case Split() if axis in dict(x.into):
            number = [name for name, _ in x.into].index(axis)
            before, after = x.into[:number], x.into[number + 1 :]
            if prod(size for _, size in before) > 1:
                return None  # a strided range, which slice cannot express
            run = prod(size for _, size in after)
            remaining = () if is_index else ((axis, stop - start),)
            part = Slice(x.x, x.axis, start * run, stop * run)
            return Split(part, x.axis, (*before, *remaining, *after))
        case Merge() if axis == x.into:
            return _merged_index(x, start) if is_index else _merged_slice(x, start, stop)
        case Split() | Merge():
            return x.with_operands(_viewed(e, x.x))
    return None


def _merged_index(merge: Merge, at: int) -> Expr:
    x = merge.x
    for name in reversed(merge.axes):
        at, position = divmod(at, merge.x.type[name].fixed_size)
        x = Index(x, name, position)
    return x


def _merged_slice(merge: Merge, start: int, stop: int) -> Expr | None:
    first, *inner_axes = merge.axes
    run = prod(merge.x.type[name].fixed_size for name in inner_axes)
    if start % run == 0 and stop % run == 0:
        return Merge(Slice(merge.x, first, start // run, stop // run), merge.axes, merge.into)
    row = start // run
    if row != (stop - 1) // run:
        return None  # the range starts or ends within a row
    merged = Merge(Index(merge.x, first, row), tuple(inner_axes), merge.into)
    return Slice(merged, merge.into, start - row * run, stop - row * run)


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
    if first.at + len(e.xs) > first.x.type[first.axis].fixed_size:
        return None
    if any(x is not first.replace(at=first.at + i) for i, x in enumerate(e.xs)):
        return None
    x = Slice(first.x, first.axis, first.at, first.at + len(e.xs))
    return Permute(renamed(x, first.axis, e.axis), e.type.names)


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
    size = e.type[e.into].fixed_size
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
    match x:
        case Tile() | Stack() if x.axis == e.old:
            return x.replace(axis=e.new)
        case Split() if e.old in dict(x.into):
            return x.replace(into=tuple((e.new if n == e.old else n, s) for n, s in x.into))
        case Merge() if x.into == e.old:
            return x.replace(into=e.new)
        case Subset():
            return x.replace(type=e.type, axis=e.new if x.axis == e.old else x.axis)
        case Full() | Normal() | TruncatedNormal() | Uniform():
            return x.replace(type=e.type)
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
    """Return `x` with its axes named `names`, with as few renames as possible.

    Cycles of names come first, so that what every inner rename of the result does is written as
    this function would write it; otherwise to simplify might never end.
    """
    pending = {old: new for old, new in zip(x.type.names, names, strict=True) if old != new}
    for start in tuple(pending):
        cycle = [start]
        while start in pending and (following := pending[cycle[-1]]) in pending:
            if following == start:
                x = _rename_cycle(x, cycle, pending)
                break
            if following in cycle:
                break
            cycle.append(following)
    while pending:
        old = next(old for old, new in pending.items() if new not in x.type)
        x = Rename(x, old, pending.pop(old))
    return x


def _rename_cycle(x: Expr, cycle: list[str], pending: dict[str, str]) -> Expr:
    """Rename axes each of which gets the name of the next; the first gets a temporary name."""
    first, *others = cycle
    aside = next(name for i in count() if (name := f"aside{i}") not in x.type)
    x = Rename(x, first, aside)
    for old in reversed(others):
        x = Rename(x, old, pending.pop(old))
    return Rename(x, aside, pending.pop(first))


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


RULES: dict[type[Expr], tuple[Rule, ...]] = {
    Index: (push_view, reorder_views),
    Slice: (drop_slice, push_view, reorder_views),
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
        simpler = expr.with_operands(*map(simplify, expr.operands))
        if simpler is expr:
            _, simpler = _by_rule(expr)
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
    rule, rewritten = _by_rule(below)
    if rule is not None:
        yield (rule.__name__, below, rewritten)
        yield from steps(rewritten)


def _by_rule(expr: Expr) -> tuple[Rule | None, Expr]:
    """Return the first rule that changes an expression, and what it makes of it."""
    for rule in RULES.get(expr.__class__, ()):
        rewritten = rule(expr)
        if rewritten is not None and rewritten is not expr:
            assert rewritten.type == expr.type, f"{rule.__name__}: {expr} : {expr.type}"
            return rule, rewritten
    return None, expr
