"""The moments of an optimiser in a tree of arrays, by the tensors of the model that they are of.

optax keeps a tree of the model's shape for each kind of moment (``mu``, ``nu``, and Adafactor's
``v_row``, ``v_col``, ``v``), T5X the kinds below each array (``m``, ``v``, ``v_row``, ``v_col``,
and ``grad_ema``, ``grad_sq_ema`` of Adam).  Factors lack one axis of their array: of two, the row
factor lacks the larger, the second of equal ones (``adafactor.py`` of t5x, ``factorized.py`` of
optax); of arrays with experts or layers besides, T5X averages rows over all but the model's width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from moecc.checkpoint.trees.tree import Piece, Tree

FIRST, SECOND, ROW, COLUMN = "m", "v", "v_row", "v_col"
"""Kinds of moments, as `moecc.steps.moment_axes` has them."""

_TREES = {"mu": FIRST, "nu": SECOND, "v": SECOND, "v_row": ROW, "v_col": COLUMN}
"""Trees of optax, by kind."""
_LEAVES = {
    "m": FIRST, "v": SECOND, "v_row": ROW, "v_col": COLUMN,
    "grad_ema": FIRST, "grad_sq_ema": SECOND,
}  # fmt: skip
"""What T5X has below an array, by kind."""

Path = tuple[str, ...]


@dataclass(frozen=True)
class SavedMoment:
    """A moment of a tensor.

    Attributes:
      piece: where it is.
      axes: which axes of the tensor it has, 0 for its rows, 1 for its columns.
    """

    piece: Piece
    axes: tuple[int, ...]


@dataclass(frozen=True)
class SavedMoments:
    """The moments of an optimiser.

    Attributes:
      optimizer: ``adamw`` or ``adafactor``.
      count: the updates that they are made of.
      of: the moments by kind and name of the tensor.
    """

    optimizer: str
    count: int
    of: Mapping[str, Mapping[str, SavedMoment]]


def find_moments(tree: Tree, arrays: Mapping[Path, str], pieces: Mapping[str, Piece]) -> (
    SavedMoments | None
):  # fmt: skip
    """Return the moments in a tree, or None if there are none.

    Args:
      tree: the tree.
      arrays: the arrays of the model, by their paths within it.
      pieces: the tensors of the model.
    """
    keys: dict[str, dict[str, str]] = {}
    places: set[Path] = set()
    for path, key in tree.keys.items():
        for kind, inside, before in _readings(path):
            if inside in arrays and key != arrays[inside]:
                keys.setdefault(kind, {})[arrays[inside]] = key
                places.add(before)
    found = {
        kind: {n: m for n, p in pieces.items() if (m := _moment(tree, kind, p, of))}
        for kind, of in keys.items()
    }
    found = {kind: of for kind, of in found.items() if of}
    if not found:
        return None
    optimizer = "adafactor" if FIRST not in found or ROW in found else "adamw"
    return SavedMoments(optimizer, _count(tree, places), found)


def _readings(path: Path) -> Iterator[tuple[str, Path, Path]]:
    """Yield the kinds of moment that a path may be of: kind, array, and what is before it."""
    # Programs on NNX keep an array below its variable.
    path = path[:-1] if path[-1] == "value" else path
    last = path[-1]
    if last in _LEAVES and "param_states" in path:
        at = path.index("param_states")
        yield _LEAVES[last], path[at + 1 : -1], path[:at]
    for at, word in enumerate(path[:-1]):
        if word in _TREES:
            inside = path[at + 1 :]
            while inside[0] == "params" and len(inside) > 1:
                inside = inside[1:]
            yield _TREES[word], inside, path[:at]


def _count(tree: Tree, places: set[Path]) -> int:
    """Return the number of updates, which is beside the moments; else that of steps."""
    beside = [(*place, word) for place in sorted(places) for word in ("count", "step")]
    for path in (*beside, ("state", "step"), ("step",)):
        if path in tree.keys and not tree.arrays.shape(tree.keys[path]):
            return int(np.asarray(tree.arrays.read_box(tree.keys[path], ())))
    return 0


def _moment(tree: Tree, kind: str, piece: Piece, of: Mapping[str, str]) -> SavedMoment | None:
    """Return the moment of a tensor; None where a zero keeps its place, or nothing does."""
    key = of.get(piece.key)
    if key is None:
        return None
    shape, found = tree.arrays.shape(piece.key), tree.arrays.shape(key)
    if found == shape and kind in (FIRST, SECOND):
        # A gradient is divided by what its weight is multiplied by.
        scale = piece.scale ** (-1 if kind == FIRST else -2)
        return SavedMoment(replace(piece, key=key, scale=scale), (0, 1) if piece.columns else (0,))
    if kind not in (ROW, COLUMN) or len(piece.rows) != 1 or len(piece.columns) != 1:
        return None
    gone = _gone(kind, piece, shape, found)
    if gone is None or piece.limit is not None:
        return None
    left = next(axis for axis in (*piece.rows, *piece.columns) if axis != gone)
    at = {axis - (axis > gone): place for axis, place in (piece.at or {}).items()}
    made = Piece(key, (left - (left > gone),), at=at or None)
    return SavedMoment(made, (0,) if left == piece.rows[0] else (1,))


def _gone(kind: str, piece: Piece, shape: tuple[int, ...], found: tuple[int, ...]) -> int | None:
    """Return the axis of an array that a factor of its second moment lacks."""
    fits = [
        axis for axis in sorted((*piece.rows, *piece.columns))
        if shape[:axis] + shape[axis + 1 :] == found
    ]  # fmt: skip
    if len(fits) < 2:
        return fits[0] if fits else None
    if len(shape) == 2:
        return fits[1] if kind == ROW else fits[0]
    width = _width(piece)
    return next(axis for axis in fits if (axis != width) == (kind == ROW))


def _width(piece: Piece) -> int:
    """Return the axis of the model's width of an array with experts or layers besides.

    T5 writes back into the stream by the matrices that are last in a block.
    """
    words = piece.key.split(".")
    is_last = any(word in ("wo", "out") for word in words)
    return piece.rows[0] if is_last else piece.columns[0]
