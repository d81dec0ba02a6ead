"""Grouped matrix multiplication: each expert's rows times that expert's weights.

On a CPU (and on many GPUs) `lax.ragged_dot` multiplies every row with every expert.  Here a loop
over the experts that have rows takes one slice of the weights at a time and multiplies the rows in
a few large blocks.  The gradients are written by hand, because differentiating ``weights[expert]``
makes a zero-filled array of the size of all weights for every slice taken.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from moecc_backends.xla.kernels.row_blocks import (
    block_sizes,
    inside,
    walk_blocks,
    walk_experts,
    zeros_after,
)
from moecc_backends.xla.trace.dtypes import accumulator, load, store, stored_as
from moecc_backends.xla.trace.typed_jax import barrier

# Up to this many rows of 32 bits it is faster to transpose them, twice, than to have the product
# repack a weight whose last axis is summed over.
_FEW_ROWS = 32


def grouped_matmul(
    rows: jax.Array,
    weights: jax.Array,
    group_sizes: jax.Array,
    contracting_axis: int,
    kind: DTypeLike | None = None,
) -> jax.Array:
    """Multiply the rows ``[rows, a]`` of each group with the weights of its expert.

    `weights` is ``[experts, a, b]`` with ``contracting_axis=1`` or ``[experts, b, a]`` with
    ``contracting_axis=2``; neither is transposed.  Groups follow one another, of `group_sizes`
    (i32 ``[experts]``) rows each.  The result ``[rows, b]`` is zero beyond the last group, and
    whatever `rows` holds there never reaches a result or a gradient.
    Sums run in float32 at least, whatever `kind` asks for; the result has the type of `rows`.
    """
    if contracting_axis not in (1, 2):
        raise ValueError(f"contracting_axis must be 1 or 2, found {contracting_axis}")
    return _product_of_groups(rows, weights, jnp.asarray(group_sizes), contracting_axis)


def grouped_matmul_of_parts(
    rows: jax.Array,
    weights: tuple[jax.Array, ...],
    group_sizes: jax.Array,
    contracting_axis: int,
) -> jax.Array:
    """Multiply rows as `grouped_matmul` does, with an array for each expert, read in place.

    `weights` are ``[a, b]`` with ``contracting_axis=1`` or ``[b, a]`` with ``contracting_axis=2``.
    Experts are written out one by one, so there should be few; and there is no gradient.
    """
    sizes = block_sizes(rows.shape[0], len(weights))
    # Each size is a loop for each expert, which take long to compile.
    two = tuple(dict.fromkeys((sizes[len(sizes) // 2], sizes[-1])))
    starts = jnp.cumsum(group_sizes) - group_sizes
    wide = weights[0].shape[2 - contracting_axis]
    output = jnp.zeros((rows.shape[0], wide), stored_as(rows.dtype))
    for number, weight in enumerate(weights):
        span = starts[number], group_sizes[number]
        output = _walk_rows(rows, weight, contracting_axis - 1, span, two, output)
    return load(output, rows.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product_of_groups(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, axis: int
) -> jax.Array:
    return _walk_product(rows, weights, group_sizes, axis)


def _forward(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, axis: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return _product_of_groups(rows, weights, group_sizes, axis), (rows, weights, group_sizes)


def _backward(
    axis: int, residuals: tuple[jax.Array, jax.Array, jax.Array], d_product: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    rows, weights, group_sizes = residuals
    d_rows = _walk_product(d_product, weights, group_sizes, 3 - axis)
    is_small = rows.shape[0] <= _FEW_ROWS and weights.dtype.itemsize >= 4
    gradient = _gradient_of_few if is_small else _walk_gradient
    return d_rows, gradient(rows, d_product, weights, group_sizes, axis), None


_product_of_groups.defvjp(_forward, _backward)


def _walk_product(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, axis: int
) -> jax.Array:
    """Multiply the rows of each expert with its weights."""
    sizes = block_sizes(rows.shape[0], group_sizes.size)
    starts = jnp.cumsum(group_sizes) - group_sizes

    def expert_body(expert: jax.Array, output: jax.Array) -> jax.Array:
        stored = lax.dynamic_index_in_dim(store(weights), expert, 0, keepdims=False)
        weight, span = load(stored, weights.dtype), (starts[expert], group_sizes[expert])
        return _walk_rows(rows, weight, axis - 1, span, sizes, output)

    zeros = zeros_after(rows, (rows.shape[0], weights.shape[3 - axis]), stored_as(rows.dtype), 0)
    return load(walk_experts(group_sizes, expert_body, zeros), rows.dtype)


def _walk_rows(
    rows: jax.Array,
    weight: jax.Array,
    axis: int,
    span: tuple[jax.Array, jax.Array],
    sizes: tuple[int, ...],
    output: jax.Array,
) -> jax.Array:
    """Write the products of one expert's rows, of which `span` is the first and the number."""
    num_rows, (begin, count) = rows.shape[0], span

    def step(start: jax.Array, size: int, is_partial: bool, output: jax.Array) -> jax.Array:
        # At the end of the array the block moves left, over rows that the mask protects.
        first = jnp.minimum(start, num_rows - size) if is_partial else start
        product = block_product(_block(rows, first, size), weight, axis)
        mask = inside(first, size, start, begin + count) if is_partial else None
        return _write(output, store(product.astype(rows.dtype)), first, mask)

    return walk_blocks(begin, count, sizes, step, output)


def _walk_gradient(
    rows: jax.Array, d_product: jax.Array, weights: jax.Array, group_sizes: jax.Array, axis: int
) -> jax.Array:
    """Sum, for each expert, the outer products of its rows and their cotangents."""
    num_rows = rows.shape[0]
    sizes = block_sizes(num_rows, group_sizes.size)
    starts = jnp.cumsum(group_sizes) - group_sizes

    def expert_body(expert: jax.Array, gradient: jax.Array) -> jax.Array:
        end = starts[expert] + group_sizes[expert]

        def outer(first: jax.Array, size: int, mask: jax.Array | None) -> jax.Array:
            block, d_block = (_block(x, first, size, mask) for x in (rows, d_product))
            return outer_product(block, d_block, axis)

        def step(start: jax.Array, size: int, is_partial: bool, total: jax.Array) -> jax.Array:
            return total + outer(start, size, None)

        # The last, partial block comes first: it makes the sum, which needs no zeros then.
        smallest = sizes[-1]
        whole = (group_sizes[expert] - 1) // smallest * smallest
        tail = starts[expert] + whole
        first = jnp.minimum(tail, num_rows - smallest)
        total = outer(first, smallest, inside(first, smallest, tail, end))
        total = walk_blocks(starts[expert], whole, sizes, step, total)
        narrow = store(total.astype(weights.dtype))
        updated: jax.Array = lax.dynamic_update_index_in_dim(gradient, narrow, expert, 0)
        return updated

    zeros = zeros_after(d_product, weights.shape, stored_as(weights.dtype), 0)
    return load(walk_experts(group_sizes, expert_body, zeros), weights.dtype)


def _gradient_of_few(
    rows: jax.Array, d_product: jax.Array, weights: jax.Array, group_sizes: jax.Array, axis: int
) -> jax.Array:
    """Return what `_walk_gradient` does, of few rows: all of them could be those of each expert.

    Gradients are larger than what they are made of, and a loop writes them twice.  Sums of narrow
    ones would be an array of twice their size.
    """
    starts = jnp.cumsum(group_sizes) - group_sizes
    numbers = jnp.arange(rows.shape[0], dtype=group_sizes.dtype)
    is_used = (numbers < group_sizes[:, None])[..., None]

    def of_experts(x: jax.Array) -> jax.Array:
        own = jnp.take(store(x), starts[:, None] + numbers, axis=0, mode="clip")
        return load(jnp.where(is_used, own, 0), x.dtype)

    left, right = of_experts(rows), of_experts(d_product)
    pair = (left, right) if axis == 1 else (right, left)
    over_rows = (((1,), (1,)), ((0,), (0,)))
    kind = accumulator(rows.dtype)
    outer = lax.dot_general(*pair, over_rows, preferred_element_type=kind)
    return outer.astype(weights.dtype)


def _block(
    rows: jax.Array, first: jax.Array, size: int, mask: jax.Array | None = None
) -> jax.Array:
    block = lax.dynamic_slice_in_dim(store(rows), first, size)
    return load(block if mask is None else jnp.where(mask, block, 0), rows.dtype)


def block_product(block: jax.Array, weight: jax.Array, contracting_axis: int) -> jax.Array:
    """Multiply a block of rows ``[rows, a]`` with one matrix; the sums are float32 at least.

    The matrix is ``[a, b]`` with ``contracting_axis=0``, or ``[b, a]`` with 1.
    """
    if contracting_axis == 1 and block.shape[0] <= _FEW_ROWS and block.dtype.itemsize >= 4:
        return barrier(_product(weight, _transposed(block), 0)).T
    return _product(block, weight, contracting_axis)


def _product(left: jax.Array, right: jax.Array, right_axis: int) -> jax.Array:
    dimensions = (((1,), (right_axis,)), ((), ()))
    kind = accumulator(left.dtype)
    return lax.dot_general(left, right, dimensions, preferred_element_type=kind)


def outer_product(block: jax.Array, d_block: jax.Array, axis: int) -> jax.Array:
    """Sum the outer products of rows ``[rows, a]`` and their cotangents ``[rows, b]``.

    The result is ``[a, b]`` with ``axis=1``, or ``[b, a]`` with 2; it is float32 at least.
    """
    left, right = (block, d_block) if axis == 1 else (d_block, block)
    return _product(_transposed(left), right, 0)


def _transposed(block: jax.Array) -> jax.Array:
    # Folded into the product, the transpose would keep it from XLA's faster kernels, which can
    # also start from the sum so far.
    return load(barrier(store(block).T), block.dtype)


def _write(
    output: jax.Array, block: jax.Array, first: jax.Array, mask: jax.Array | None
) -> jax.Array:
    if mask is not None:
        block = jnp.where(mask, block, lax.dynamic_slice_in_dim(output, first, block.shape[0]))
    return lax.dynamic_update_slice_in_dim(output, block, first, 0)
