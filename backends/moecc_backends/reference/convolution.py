"""The meaning of convolutions."""

from __future__ import annotations

from itertools import product

import numpy as np

from moecc_backends.reference.arrays import Array, meaning

Names = tuple[str, ...]


@meaning("convolve")
def convolve(
    x: Array, w: Array, *, over: Names, along: Names, taps: Names, stride: int, padding: int
) -> Array:
    """Sum over the places of a window what x has there, times the weights of that place."""
    margins = [(padding, padding) if name in along else (0, 0) for name in x.axes]
    padded = np.pad(x.data, margins)
    counts = {tap: w.size(tap) for tap in taps}
    last = {a: x.size(a) + 2 * padding - counts[t] for a, t in zip(along, taps, strict=True)}
    result = [a for a in x.axes if a not in over]
    result += [a for a in w.axes if a not in (*over, *taps)]
    number = {name: i for i, name in enumerate(dict.fromkeys((*x.axes, *w.axes)))}
    total: float | np.ndarray = 0.0
    for place in product(*(range(counts[tap]) for tap in taps)):
        at = dict(zip(along, place, strict=True))
        seen = tuple(
            slice(at[n], at[n] + last[n] + 1, stride) if n in at else slice(None) for n in x.axes
        )
        chosen = dict(zip(taps, place, strict=True))
        weights = w.data[tuple(chosen.get(n, slice(None)) for n in w.axes)]
        total = total + np.einsum(
            padded[seen],
            [number[n] for n in x.axes],
            weights,
            [number[n] for n in w.axes if n not in taps],
            [number[n] for n in result],
        )
    return Array(np.asarray(total), tuple(result))
