"""Grouped products against a float64 loop over the rows: values, gradients, masks and cost."""

from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from moecc_backends.xla.kernels.grouped_matmul import (
    grouped_matmul,
    grouped_matmul_of_parts,
    rows_times,
)
from tiers import examples

SHAPES = ((5, 3), (100, 2), (600, 4), (32, 4), (128, 4))
"""Rows and experts; a shape for each family of block sizes, and as many rows as a block has."""

WIDTHS = (6, 10)


@st.composite
def grouped_rows(draw):
    """Draw a number of rows, and group sizes that may leave rows and experts without any."""
    num_rows, num_experts = draw(st.sampled_from(SHAPES))
    cuts = draw(st.lists(st.integers(0, num_rows), min_size=num_experts, max_size=num_experts))
    return num_rows, np.diff(sorted(cuts), prepend=0).astype(np.int32)


def _arrays(num_rows, num_experts, axis, seed=0):
    a, b = WIDTHS
    rng = np.random.default_rng(seed)
    matrix = (a, b) if axis == 1 else (b, a)
    shapes = ((num_rows, a), (num_experts, *matrix), (num_rows, b))
    return [rng.normal(size=s) for s in shapes]


def _expert_of_row(num_rows, sizes):
    expert = np.repeat(np.arange(sizes.size), sizes)
    return np.pad(expert, (0, num_rows - expert.size), constant_values=-1)


def _oracle(rows, weight, d_product, sizes, axis):
    """Return the product and the gradients of rows and weight, one row after the other."""
    product, d_rows, d_weight = np.zeros_like(d_product), np.zeros_like(rows), np.zeros_like(weight)
    for r, e in enumerate(_expert_of_row(len(rows), sizes)):
        if e < 0:
            continue
        matrix = weight[e] if axis == 1 else weight[e].T
        product[r], d_rows[r] = rows[r] @ matrix, matrix @ d_product[r]
        outer = np.outer(rows[r], d_product[r])
        d_weight[e] += outer if axis == 1 else outer.T
    return product, d_rows, d_weight


@partial(jax.jit, static_argnums=3)
def _with_gradients(rows, weights, sizes, axis, cotangent):
    call = partial(grouped_matmul, group_sizes=sizes, contracting_axis=axis)
    product, pull = jax.vjp(call, rows, weights)
    return product, *pull(cotangent)


@pytest.mark.parametrize("axis", [1, 2])
@given(case=grouped_rows(), seed=st.integers(0, 9))
@settings(max_examples=examples(8, 25))
def test_values_and_gradients_are_exact(case, seed, axis):
    num_rows, sizes = case
    rows, weights, d_product = _arrays(num_rows, sizes.size, axis, seed)
    with jax.enable_x64(True):
        arrays = _with_gradients(rows, weights, sizes, axis, d_product)
    for found, expected in zip(arrays, _oracle(rows, weights, d_product, sizes, axis), strict=True):
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("axis", [1, 2])
def test_what_lies_beyond_the_groups_never_leaks(axis):
    sizes = np.array([70, 0, 23], np.int32)
    results = []
    for beyond in (0, np.nan):
        arrays = [a.astype(np.float32) for a in _arrays(128, 3, axis)]
        for array in arrays:
            if len(array) == 128:
                array[sizes.sum() :] = beyond
        rows, weights, d_product = arrays
        results.append(_with_gradients(rows, weights, sizes, axis, d_product))
    for expected, found in zip(*results, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("axis", [1, 2])
def test_bfloat16_sums_in_float32(axis):
    # In bfloat16 a running sum of ones stops at 256.
    width, num_rows, sizes = 1024, 600, np.array([520, 80], np.int32)
    rows = np.ones((num_rows, width), ml_dtypes.bfloat16)
    shape = (2, width, 3) if axis == 1 else (2, 3, width)
    weight, d_product = np.ones(shape, rows.dtype), np.ones((num_rows, 3), rows.dtype)
    product, d_rows, d_weight = _with_gradients(rows, weight, sizes, axis, d_product)
    assert product.dtype == d_rows.dtype == d_weight.dtype == ml_dtypes.bfloat16
    for array, total in ((product, width), (d_rows, 3), (d_weight[0], 520), (d_weight[1], 80)):
        np.testing.assert_array_equal(np.asarray(array, np.float32), total)


def test_bfloat16_is_never_widened_whole():
    # XLA would widen the array that a block is written into, were it of bfloat16.
    like = [jax.ShapeDtypeStruct(a.shape, jnp.bfloat16) for a in _arrays(600, 4, 2)]
    rows, weights, d_product = like
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
    program = _with_gradients.lower(rows, weights, sizes, 2, d_product).compile().as_text()
    assert "u16[600,10]" in program
    for array in like:
        assert f"f32[{','.join(map(str, array.shape))}]" not in program


@pytest.mark.parametrize("axis", [1, 2])
@given(case=grouped_rows())
@settings(max_examples=examples(6, 40))
def test_an_array_for_each_expert(case, axis):
    """Experts with arrays of their own have the product of one array for all."""
    num_rows, sizes = case
    rows, weight, d_product = _arrays(num_rows, sizes.size, axis)
    expected, _, _ = _oracle(rows, weight, d_product, sizes, axis)
    product = jax.jit(grouped_matmul_of_parts, static_argnums=3)
    found = product(jnp.asarray(rows, jnp.float32), tuple(map(jnp.asarray, weight)), sizes, axis)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("widths", [(3, 7), (7, 3), (4, 4)])
def test_product_and_gradients_of_one_matrix_are_those_of_jax(widths, at):
    a, b = widths
    rng = np.random.default_rng(0)
    rows, slope = rng.normal(size=(5, a)), rng.normal(size=(5, b))
    matrix = rng.normal(size=(a, b) if at == 0 else (b, a))

    def plain(rows, matrix):
        return rows @ (matrix if at == 0 else matrix.T)

    with jax.enable_x64():
        product, pull = jax.vjp(lambda x, w: rows_times(x, w, at), rows, matrix)
        expected, plain_pull = jax.vjp(plain, rows, matrix)
        np.testing.assert_allclose(product, expected, rtol=1e-13)
        for found, gradient in zip(pull(slope), plain_pull(slope), strict=True):
            np.testing.assert_allclose(found, gradient, rtol=1e-12, atol=1e-14)
