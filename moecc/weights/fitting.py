"""Values of expressions that are computed as a whole, and kept for the next tensor that needs them.

An order is needed by every matrix of a block, and by each of its experts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from weakref import WeakKeyDictionary, ref

import ml_dtypes
import numpy as np

from moecc.types.arrays import Array, Doubles
from moecc.weights.expr import Expr

MAX_KEPT_BYTES = 1 << 22
"""Larger values are computed again."""

_kept: WeakKeyDictionary[Expr, tuple[ref[object], Array]] = WeakKeyDictionary()
_lock = threading.RLock()
"""Held while a value is computed, which may need others: a matrix for each thread that asks for
the same order would take its memory many times."""


def remembered(expr: Expr, reader: object, compute: Callable[[], Array]) -> Array:
    """Return the value of `expr` over a checkpoint, computed once while both exist.

    Args:
      expr: the expression.
      reader: reads its sources: a method of the checkpoint, or a function.
      compute: computes the value.
    """
    owner = getattr(reader, "__self__", reader)
    with _lock:
        known = _kept.get(expr)
        if known is not None and known[0]() is owner:
            return known[1]
        made = compute()
        if made.nbytes <= MAX_KEPT_BYTES:
            _kept[expr] = (ref(owner), made)
    return made


def fitted_rows(
    covariance: Doubles, mean: Doubles, cross: Doubles, *, ridge: float, std: float
) -> Array:
    """Return the rows of a router, ``[expert, embed]``; see `moecc.weights.fits.Fitted`."""
    rows = cross
    unit = float(np.trace(covariance)) / len(mean)
    if ridge and unit > 0:
        regular = covariance.copy()
        np.einsum("ii->i", regular)[:] += ridge * unit
        rows = np.asarray(np.linalg.solve(regular, cross.T).T, np.float64)
    rows = rows - rows.mean(axis=0)
    length = float(mean @ mean)
    if length:
        rows = rows - np.outer(rows @ mean / length, mean)
    variance = float(np.einsum("ed,dc,ec->", rows, covariance, rows)) / len(rows)
    # Where the input says nothing of the targets, all rows are zero, or noise of rounding.
    scale = std / variance**0.5 if variance > 0 else 0.0
    return np.asarray((rows * scale).astype(ml_dtypes.bfloat16), np.float32)
