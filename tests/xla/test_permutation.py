"""Sorting choices by expert."""

import hypothesis.strategies as st
import jax
import numpy as np
from hypothesis import given, settings
from moecc_backends.xla.dispatch import sorted_rows as perm

SHAPES = ((1, 1), (7, 2), (33, 3), (64, 8))
"""Few shapes, so that few programs are compiled: the routing varies, not the program."""

NUM_EXPERTS = 8

sort = jax.jit(perm.sort_by_expert, static_argnums=1)
permuted = jax.jit(perm.sorted_permutation)


@st.composite
def routings(draw):
    """Draw experts and a placed mask ``[tokens, choice]``: skewed, constant or uniform."""
    shape = draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    used = draw(st.integers(1, NUM_EXPERTS))
    offset = draw(st.integers(0, NUM_EXPERTS - used))
    experts = rng.integers(0, used, shape, dtype=np.int32) + np.int32(offset)
    return experts, rng.random(shape) < draw(st.sampled_from((0.0, 0.5, 1.0)))


@given(routings())
@settings(max_examples=60)
def test_choices_that_are_not_placed_come_last(case):
    experts, placed = case
    order, inverse, sizes = map(np.asarray, sort(experts, NUM_EXPERTS, placed))
    kept = np.flatnonzero(placed)
    expected = kept[np.argsort(experts.reshape(-1)[kept], kind="stable")]
    np.testing.assert_array_equal(order[: kept.size], expected)
    np.testing.assert_array_equal(np.sort(order[kept.size :]), np.flatnonzero(~placed))
    np.testing.assert_array_equal(sizes, np.bincount(experts[placed], minlength=NUM_EXPERTS))
    permutation = permuted(perm.SortedChoices(order, inverse, sizes))
    np.testing.assert_array_equal(np.asarray(permutation.row_of_choice) >= 0, placed)
