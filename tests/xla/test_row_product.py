"""Rows times a matrix on a CPU: the product, its gradients, and what a step does with memory."""

import jax
import numpy as np
import pytest
from moecc_backends.xla.kernels.grouped_matmul import rows_times

WIDTHS = ((3, 7), (7, 3), (4, 4))


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("widths", WIDTHS)
def test_product_and_gradients_are_those_of_jax(widths, at):
    a, b = widths
    rng = np.random.default_rng(0)
    rows, slope = rng.normal(size=(5, a)), rng.normal(size=(5, b))
    matrix = rng.normal(size=(a, b) if at == 0 else (b, a))

    def plain(rows, matrix):
        return rows @ (matrix if at == 0 else matrix.T)

    with jax.enable_x64():
        made, back = jax.vjp(lambda x, w: rows_times(x, w, at), rows, matrix)
        expected, plain_back = jax.vjp(plain, rows, matrix)
        np.testing.assert_allclose(made, expected, rtol=1e-13)
        for found, right in zip(back(slope), plain_back(slope), strict=True):
            np.testing.assert_allclose(found, right, rtol=1e-12, atol=1e-14)
