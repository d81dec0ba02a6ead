"""The meaning of the one product of tensors."""

from __future__ import annotations

import numpy as np

from moecc_backends.reference.arrays import Array, meaning


@meaning("contract")
def contract(x: Array, w: Array, *, over: tuple[str, ...], precision: str) -> Array:
    """Sum x · w over the axes `over`; every other shared axis is a batch axis.

    The reference computes in float64, which is precise enough for every `precision`.
    """
    return product(x, w, over)


def product(x: Array, w: Array, over: tuple[str, ...]) -> Array:
    """Return the sum of x · w over the axes `over`."""
    result = [a for a in dict.fromkeys((*x.axes, *w.axes)) if a not in over]
    number = {a: i for i, a in enumerate(dict.fromkeys((*x.axes, *w.axes)))}
    summed = np.einsum(
        x.data,
        [number[a] for a in x.axes],
        w.data,
        [number[a] for a in w.axes],
        [number[a] for a in result],
        optimize=True,
    )
    return Array(np.asarray(summed), tuple(result))
