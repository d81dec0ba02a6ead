"""Memory for large arrays."""

from __future__ import annotations

import numpy as np
import pytest

from moecc.weights.evaluate import ALIGNMENT, empty


@pytest.mark.parametrize("size", [0, 3, 100_000, 300_001, 5_000_000])
def test_arrays_are_aligned_and_apart(size):
    arrays = [empty((size,), np.dtype(np.float32)) for _ in range(3)]
    for number, array in enumerate(arrays):
        array[:] = number
    assert [set(array) for array in arrays] == [{n} if size else set() for n in range(3)]
    if size > 100_000:
        assert not any(array.ctypes.data % ALIGNMENT for array in arrays)
