"""Invert a family's weight expressions: from a parameter to the tensors it is read from.

A family reads a parameter by moving data only: it stacks, cuts, renames or permutes tensors.  Each
of these can be inverted, so an expression for the parameter yields one for every tensor.
"""

from __future__ import annotations

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
    tensors: list[tuple[str, Expr]] = []
    stack: list[Pair] = [(read, made)]
    while stack:
        pattern, value = stack.pop()
        if isinstance(pattern, Source):
            tensors.append((pattern.name, simplify(value)))
        else:
            stack.extend(reversed(_undone(pattern, value)))
    return tensors


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
