"""The meaning of writing a range into a value."""

from __future__ import annotations

import numpy as np

from moecc_backends.reference.arrays import Array, meaning


@meaning("update_slice")
def update_slice(x: Array, update: Array, start: Array, *, axis: str) -> Array:
    """Return x with the range of the axis from `start` on replaced, moved to where it fits."""
    size, most = update.size(axis), x.size(axis) - update.size(axis)
    first = min(max(int(start.data), 0), most)
    made = np.moveaxis(x.data.copy(), x.axes.index(axis), 0)
    rest = [a for a in x.axes if a != axis]
    made[first : first + size] = update.to((axis, *rest))
    return Array(np.moveaxis(made, 0, x.axes.index(axis)), x.axes)
