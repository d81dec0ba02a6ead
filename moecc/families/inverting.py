"""Invert a family's weight expressions: from a parameter to the tensors it is read from.

A family reads a parameter by moving data only: it stacks, cuts, renames or permutes tensors.  Each
of these can be inverted, so an expression for the parameter yields one for every tensor.  A tensor
of which several parameters read a part each is put together when all parts are there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from moecc.weights.expr import Expr, Source
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
from moecc.weights.simplify import simplify

Pair = tuple[Expr, Expr]


def tensors_of(read: Expr, made: Expr) -> list[tuple[str, Expr]]:
    """Return the tensors of `read`, how a family reads a parameter, if the parameter is `made`.

    Returns:
      The names of the tensors and an expression for each, simplified.

    Raises:
      ValueError: `read` is not composed of invertible movements.
    """
    return tensors_of_all([(read, made)])


def tensors_of_all(pairs: Iterable[Pair]) -> list[tuple[str, Expr]]:
    """Return the tensors that all parameters of a model are read from; see `tensors_of`.

    Args:
      pairs: for each parameter how it is read, and what it is.

    Raises:
      ValueError: a parameter is read otherwise than by invertible movements, or a part of a tensor
        is read by none.
    """
    tensors: list[tuple[str, Expr]] = []
    parts = _Parts()
    for pair in pairs:
        stack: list[Pair] = [pair]
        while stack:
            pattern, value = stack.pop()
            if isinstance(pattern, Source):
                tensors.append((pattern.name, simplify(value)))
            elif isinstance(pattern, Slice) or _picks_one_of_several(pattern):
                stack.extend(parts.add(pattern, value))
            else:
                stack.extend(reversed(_undone(pattern, value)))
    parts.require_complete()
    return tensors


def _picks_one_of_several(pattern: Expr) -> bool:
    return isinstance(pattern, Index) and pattern.x.type[pattern.axis].size != 1


@dataclass
class _Parts:
    """Parts of expressions, each given by another parameter, until all of one are there."""

    found: dict[tuple[Expr, str], dict[int, Pair]] = field(default_factory=dict)

    def add(self, pattern: Expr, value: Expr) -> list[Pair]:
        """Take what a slice or an entry of an expression is; return the whole once it is known."""
        assert isinstance(pattern, Slice | Index), "the patterns of parts"
        at = pattern.start if isinstance(pattern, Slice) else pattern.at
        key = (pattern.x, pattern.axis)
        parts = self.found.setdefault(key, {})
        parts[at] = (pattern, value)
        whole = _joined(pattern, [parts[at] for at in sorted(parts)])
        if whole is None:
            return []
        del self.found[key]
        return [(pattern.x, whole)]

    def require_complete(self) -> None:
        """Raise ValueError if a part was never given."""
        for pattern in (pattern for parts in self.found.values() for pattern, _ in parts.values()):
            raise ValueError(f"{pattern} cannot be inverted: the rest of it is read by nothing")


def _joined(pattern: Slice | Index, parts: list[Pair]) -> Expr | None:
    """Return the whole of which `parts` are the parts, in order, or None if one is missing."""
    size = pattern.x.type[pattern.axis].size
    assert isinstance(size, int), "a weight has fixed sizes"
    values = tuple(value for _, value in parts)
    if isinstance(pattern, Index):
        position = pattern.x.type.names.index(pattern.axis)
        return Stack(values, pattern.axis, position) if len(parts) == size else None
    slices = [part for part, _ in parts if isinstance(part, Slice)]
    ends = [0, *(part.stop for part in slices)]
    if len(slices) < len(parts) or ends[-1] != size:
        return None
    whole = all(part.start == end for part, end in zip(slices, ends, strict=False))
    return Concat(values, pattern.axis) if whole else None


def _undone(pattern: Expr, value: Expr) -> list[Pair]:
    """Return each operand of `pattern` with what it must be if `pattern` is `value`."""
    match pattern:
        case Stack():
            return [(x, _at(value, pattern.axis, i)) for i, x in enumerate(pattern.xs)]
        case Concat():
            return _cut(pattern, value)
        case Index() if pattern.x.type[pattern.axis].size == 1:
            return [(pattern.x, _with_axis(pattern, value))]
        case Permute():
            return [(pattern.x, Permute(value, pattern.x.type.names))]
        case Rename():
            return [(pattern.x, Rename(value, pattern.new, pattern.old))]
        case Split():
            names = tuple(name for name, _ in pattern.into)
            return [(pattern.x, Merge(value, names, pattern.axis))]
        case Merge():
            sizes = zip(pattern.axes, (pattern.x.type[a].size for a in pattern.axes), strict=True)
            into = tuple((name, size) for name, size in sizes if isinstance(size, int))
            return [(pattern.x, Split(value, pattern.into, into))]
    raise ValueError(f"{pattern} cannot be inverted")


def _at(value: Expr, axis: str, position: int) -> Expr:
    """Return one position of an axis; common cases directly, others are simplified later."""
    if isinstance(value, Stack) and value.axis == axis:
        return value.xs[position]
    if isinstance(value, Tile) and value.axis == axis:
        return value.x
    return Index(value, axis, position)


def _with_axis(pattern: Index, value: Expr) -> Expr:
    """Return `value` with the size-1 axis that `pattern` removes."""
    if isinstance(value, Index) and value.axis == pattern.axis:
        whole = value.x.type
        if whole.names == pattern.x.type.names and whole.shape == pattern.x.type.shape:
            return value.x
    return Stack((value,), pattern.axis, pattern.x.type.names.index(pattern.axis))


def _cut(pattern: Concat, value: Expr) -> list[Pair]:
    pairs: list[Pair] = []
    start = 0
    for x in pattern.xs:
        size = x.type[pattern.axis].size
        assert isinstance(size, int), "a weight has fixed sizes"
        pairs.append((x, Slice(value, pattern.axis, start, start + size)))
        start += size
    return pairs
