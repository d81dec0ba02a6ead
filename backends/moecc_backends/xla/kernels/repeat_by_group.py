"""Repeat what each expert has one of, a bias say, over the rows of that expert."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from moecc_backends.xla.kernels.row_blocks import inside, walk_blocks, walk_experts, zeros_after
from moecc_backends.xla.trace.dtypes import accumulator, load, store

# Rows that a sum over a group takes at a time.
_SUMMED_ROWS = 128


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def repeat_by_group(values: jax.Array, group_sizes: jax.Array, num_rows: int) -> jax.Array:
    """Repeat ``[experts, …]`` over the rows of each expert into ``[rows, …]``.

    Rows beyond the last group get the last expert's values; what their cotangent holds does not
    reach the gradient, which is a sum over each group in float32 at least.
    """
    ends = jnp.cumsum(group_sizes)
    expert = jnp.searchsorted(ends, jnp.arange(num_rows, dtype=ends.dtype), side="right")
    return load(jnp.take(store(values), expert, axis=0, mode="clip"), values.dtype)


def _forward(
    values: jax.Array, group_sizes: jax.Array, num_rows: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return repeat_by_group(values, group_sizes, num_rows), (values, group_sizes)


def _backward(
    num_rows: int, residuals: tuple[jax.Array, jax.Array], d_rows: jax.Array
) -> tuple[jax.Array, None]:
    values, group_sizes = residuals
    flat = d_rows.reshape(num_rows, -1)
    stored = store(flat)
    starts = jnp.cumsum(group_sizes) - group_sizes
    size = min(num_rows, _SUMMED_ROWS)

    def expert_body(expert: jax.Array, sums: jax.Array) -> jax.Array:
        end = starts[expert] + group_sizes[expert]

        def step(start: jax.Array, size: int, is_partial: bool, total: jax.Array) -> jax.Array:
            first = jnp.minimum(start, num_rows - size)
            block = lax.dynamic_slice_in_dim(stored, first, size)
            block = jnp.where(inside(first, size, start, end), block, 0)
            return total + jnp.sum(load(block, flat.dtype).astype(sums.dtype), axis=0)

        total = zeros_after(flat, flat.shape[1:], sums.dtype, 1)
        total = walk_blocks(starts[expert], group_sizes[expert], (size,), step, total)
        return lax.dynamic_update_slice_in_dim(sums, total[None], expert, 0)

    sums = zeros_after(flat, (values.shape[0], flat.shape[1]), accumulator(flat.dtype), 0)
    sums = walk_experts(group_sizes, expert_body, sums)
    return sums.astype(values.dtype).reshape(values.shape), None


repeat_by_group.defvjp(_forward, _backward)
