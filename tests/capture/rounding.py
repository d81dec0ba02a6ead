"""How far statistics in float32 may be from exact ones: first-order bounds of rounding."""

from __future__ import annotations

import numpy as np

from moecc.types import Array

UNIT = 2.0**-24
"""The unit roundoff of float32."""


def bounds_of_block(x: Array, hidden: Array, roundings: int = 0) -> dict[str, Array]:
    """Return the largest error of each statistic of a dense block, with the shape of the statistic.

    With δ the error of a value, a mean is off by δ, and a covariance of x and y by
    2 (δx · mean |y| + δy · mean |x|): once by its products, and once by its means.  Sums are kept
    in float64, but for x · |h|, whose n products are added up in float32: n · u · mean |x||h|
    (Higham, Accuracy and Stability of Numerical Algorithms, §3.1).  All are stored as float32: a
    covariance is off by u times the sum of the mean product and the product of the means, which is
    not the smaller of the two where x and y are large in turn.

    Args:
      x: the inputs, ``[tokens, embed]``.
      hidden: the hidden values, ``[tokens, mlp]``.
      roundings: the operations that a value came through, each off by u of the largest value.
    """
    size, height = np.abs(x).astype(np.float64), np.abs(hidden).astype(np.float64)
    wide, tall = size.mean(0), height.mean(0)
    of_x, of_hidden = (roundings * UNIT * v.max() for v in (size, height))
    squares, cross = size.T @ size / len(x), size.T @ height / len(x)
    return {
        "input.mean": of_x + UNIT * wide,
        "input.covariance": (
            2 * of_x * np.add.outer(wide, wide) + UNIT * (squares + np.outer(wide, wide))
        ),
        "hidden.mean": of_hidden + UNIT * tall,
        "hidden.cross": (
            2 * (of_x * tall + of_hidden * wide[:, None])
            + UNIT * ((len(x) + 2) * cross + np.outer(wide, tall))
        ),
        "texts.cross": 2 * (of_x + UNIT * wide),
    }


def assert_within(measured: Array, expected: Array, bound: Array):
    """Check that no element is further off than its bound; float64 itself rounds by 1e-15."""
    off = np.abs(measured.astype(np.float64) - expected) - bound
    assert off.max() <= 1e-14, f"{off.max():.2g} beyond the bound"
