"""The room of an array on a TPU, against the tiles of every order of its axes, counted."""

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecc.plan.machines import padded


def rooms(sizes):
    """Return the entries in the tiles that each order of the axes touches."""
    found = []
    for *outer, rows, columns in permutations(sizes):
        tiles = len(range(0, rows, 8)) * len(range(0, columns, 128))
        for size in outer:
            tiles *= size
        found.append(tiles * 8 * 128)
    return found


@given(st.lists(st.integers(2, 400), min_size=2, max_size=4))
def test_of_all_orders_the_one_that_pads_least(sizes):
    assert padded(sizes, "tpu") == pytest.approx(min(rooms(sizes)))
