"""Means and standard deviations whose bytes do not depend on the division into blocks."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from moecc.types.arrays import Array
from moecc.types.dtypes import F64
from moecc.weights.arithmetic import Moment
from moecc.weights.boxes import Box, align, project
from moecc.weights.expr import Expr
from moecc.weights.rounding import widen

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
Block = Callable[[Expr, Box], Array]
Ranges = dict[str, tuple[int, int]]

_WORK_ELEMENTS = 1 << 19
"""How many elements are widened to float64 at a time, 4 MiB."""

_REMEMBERED = 4096
_REMEMBERED_BYTES = 1 << 16


class Memory:
    """Computes moments and caches small results, which each block of a tensor needs again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[Moment, Box], Floats] = OrderedDict()

    def moment(self, block: Block, e: Moment, box: Box) -> Floats:
        """Return a moment in float64, for the kept positions in `box`.

        Args:
          block: evaluates a box of an expression.
          e: the moment.
          box: a range of each kept axis.
        """
        with self._lock:
            known = self._known.get((e, box))
        if known is not None:
            return known
        made = self._computed(block, e, box)
        if made.nbytes <= _REMEMBERED_BYTES:
            self._remember((e, box), made)
        return made

    def _computed(self, block: Block, e: Moment, box: Box) -> Floats:
        """Return a moment, of a few kept positions at a time, in the order in which x is stored."""
        cut = _cut(e, box)
        if cut is not None:
            at, step = cut
            start, stop = box[at]
            pieces = [
                self._computed(block, e, (*box[:at], (i, min(i + step, stop)), *box[at + 1 :]))
                for i in range(start, stop, step)
            ]
            return np.concatenate(pieces, axis=at)
        if e.kind == "mean":
            return _mean(block, e, box, None)
        centre = self.moment(block, Moment("mean", e.x, e.mask, e.keep), box)
        return np.asarray(np.sqrt(_mean(block, e, box, centre)))

    def _remember(self, key: tuple[Moment, Box], value: Floats) -> None:
        with self._lock:
            self._known[key] = value
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)


def _cut(e: Moment, box: Box) -> tuple[int, int] | None:
    """Return which kept axis to divide, and into pieces of how many; None if all is small enough.

    The outermost axis of x first: its pieces lie together.
    """
    kept = dict(zip(e.keep, box, strict=True))
    elements = prod(
        kept[n][1] - kept[n][0] if n in kept else size
        for n, size in zip(e.x.type.names, e.x.type.shape, strict=True)
    )
    for name in e.x.type.names if elements > _WORK_ELEMENTS else ():
        start, stop = kept.get(name, (0, 1))
        if stop - start > 1:
            return e.keep.index(name), max(1, _WORK_ELEMENTS * (stop - start) // elements)
    return None


def _mean(block: Block, e: Moment, box: Box, centre: Floats | None) -> Floats:
    """Return the mean over the reduced axes of x, or of its squared distance from `centre`."""
    kept = dict(zip(e.keep, box, strict=True))
    reduced = tuple(name for name in e.x.type.names if name not in e.keep)
    total, count = _Sums(block, e, centre).sums(kept, reduced)
    return np.divide(total, count, out=np.zeros_like(total), where=count > 0)


@dataclass(frozen=True)
class _Sums:
    """Sums the elements that count, axis after axis, the last first."""

    block: Block
    e: Moment
    centre: Floats | None

    def sums(self, kept: Ranges, reduced: tuple[str, ...]) -> tuple[Floats, Counts]:
        """Return sums and numbers of elements, with the axes of `kept` in their order."""
        sizes = [self.e.x.type.shape[self.e.x.type.names.index(name)] for name in reduced]
        elements = prod(stop - start for start, stop in kept.values()) * prod(sizes)
        if not reduced or elements <= _WORK_ELEMENTS:
            return self.direct(kept, reduced)
        step = max(1, _WORK_ELEMENTS * sizes[0] // elements)
        parts = [
            self.sums({**kept, reduced[0]: (at, min(at + step, sizes[0]))}, reduced[1:])
            for at in range(0, sizes[0], step)
        ]
        total = np.concatenate([part for part, _ in parts], axis=-1)
        return _fold(total), np.concatenate([n for _, n in parts], axis=-1).sum(axis=-1)

    def direct(self, kept: Ranges, reduced: tuple[str, ...]) -> tuple[Floats, Counts]:
        x = self.e.x.type
        box = tuple(kept.get(n, (0, size)) for n, size in zip(x.names, x.shape, strict=True))
        order = (*kept, *reduced)
        values = widen(align(self.block(self.e.x, box), x.names, order), F64)
        if self.centre is not None:
            centre = self.centre.reshape(self.centre.shape + (1,) * (x.rank - self.centre.ndim))
            with np.errstate(invalid="ignore"):  # ∞ − ∞, in a source that may hold infinity
                values -= centre
            values *= values
        counted = np.ones((1,) * x.rank, bool)
        if self.e.mask is not None:
            mask = self.e.mask.type
            counted = align(self.block(self.e.mask, project(box, x, mask)), mask.names, order)
            values = np.where(counted, values, 0.0)
        count = np.broadcast_to(counted, values.shape).sum(
            axis=tuple(range(len(kept), x.rank)), dtype=np.int64
        )
        for _ in reduced:
            values = _fold(values)
        return values, np.asarray(count)


def _fold(values: Floats) -> Floats:
    """Sum the last axis, halving it again and again.

    The tree of additions depends on the length alone: `numpy.sum` may add in another order on
    another processor.
    """
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        odd = values[..., 2 * half :]
        values = values[..., :half] + values[..., half : 2 * half]
        values[..., : odd.shape[-1]] += odd
    return values[..., 0] if values.shape[-1] else np.zeros(values.shape[:-1])
