"""The meaning of chunks."""

from __future__ import annotations

import numpy as np

from moecc_backends.reference.arrays import Array, meaning


@meaning("chunk")
def chunk(x: Array, *, axis: str, at: int, of: int, parts: int) -> Array:
    """Return piece `at` of each of `parts` equal runs of the axis, one after the other."""
    place = x.axes.index(axis)
    before, size, after = x.data.shape[:place], x.size(axis), x.data.shape[place + 1 :]
    cells = x.data.reshape(*before, parts, of, size // (parts * of), *after)
    picked = cells.take(at, place + 1)
    return Array(picked.reshape(*before, size // of, *after), x.axes)


@meaning("join")
def join(*chunks: Array, axis: str, parts: int) -> Array:
    """Return the value whose chunks these are."""
    first = chunks[0]
    if parts == 1:
        together = [c.to(first.axes) for c in chunks]
        return Array(np.concatenate(together, first.axes.index(axis)), first.axes)
    place = first.axes.index(axis)
    before, size, after = first.data.shape[:place], first.size(axis), first.data.shape[place + 1 :]
    cells = [c.data.reshape(*before, parts, size // parts, *after) for c in chunks]
    joined = np.stack(cells, place + 1).reshape(*before, size * len(chunks), *after)
    return Array(joined, first.axes)
