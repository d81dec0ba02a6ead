"""Rules for the nodes that move data."""

from __future__ import annotations

from itertools import count

from moecc.types.tensor import TensorType
from moecc.weights.draws import Normal, Subset, TruncatedNormal, Uniform
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
from moecc.weights.rules.views import renamed


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
    rest = inner.into[at + len(e.axes) :]
    return Split(inner.x, inner.axis, (*inner.into[:at], (e.into, size), *rest))


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
