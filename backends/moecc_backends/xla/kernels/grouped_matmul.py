"""Grouped matrix multiplication: each expert's rows times that expert's weights.

On a CPU (and on many GPUs) `lax.ragged_dot` multiplies every row with every expert.  Here a loop
over the experts that have rows takes one slice of the weights at a time and multiplies the rows in
a few large blocks.  The gradients are written by hand, because differentiating ``weights[expert]``
makes a zero-filled array of the size of all weights for every slice taken.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import overload

import jax
import jax.numpy as jnp
from jax import lax

from moecc_backends.xla.kernels.row_blocks import (
    block_sizes,
    inside,
    walk_blocks,
    walk_experts,
    zeros_after,
)
from moecc_backends.xla.trace.dtypes import accumulator, load, store, stored_as

Arrays = tuple[jax.Array, ...]

# Up to this many rows of 32 bits it is faster to transpose them, twice, than to have the product
# repack a weight whose last axis is summed over.
_FEW_ROWS = 32

_barrier: Callable[[jax.Array], jax.Array] = lax.optimization_barrier


@overload
def grouped_matmul(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, *, contracting_axis: int
) -> jax.Array: ...
@overload
def grouped_matmul(
    rows: jax.Array, weights: Arrays, group_sizes: jax.Array, *, contracting_axis: int
) -> Arrays: ...
def grouped_matmul(
    rows: jax.Array,
    weights: jax.Array | Arrays,
    group_sizes: jax.Array,
    *,
    contracting_axis: int,
) -> jax.Array | Arrays:
    """Multiply the rows ``[rows, a]`` of each group with the weights of its expert.

    `weights` is ``[experts, a, b]`` with ``contracting_axis=1`` or ``[experts, b, a]`` with
    ``contracting_axis=2``; neither is transposed.  A tuple of weights (gate and up) shares one walk
    over the rows and gives a tuple.  Groups lie one after the other, of `group_sizes` (i32
    ``[experts]``) rows each.  The result ``[rows, b]`` is zero beyond the last group, and whatever
    `rows` holds there never reaches a result or a gradient.
    Sums run in float32 at least; results have the type of `rows`.
    """
    if contracting_axis not in (1, 2):
        raise ValueError(f"contracting_axis must be 1 or 2, found {contracting_axis}")
    group_sizes = jnp.asarray(group_sizes)
    if isinstance(weights, tuple):
        return _products(rows, weights, group_sizes, contracting_axis)
    return _products(rows, (weights,), group_sizes, contracting_axis)[0]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _products(rows: jax.Array, weights: Arrays, group_sizes: jax.Array, axis: int) -> Arrays:
    return _walk_products((rows,), weights, group_sizes, axis)


def _forward(
    rows: jax.Array, weights: Arrays, group_sizes: jax.Array, axis: int
) -> tuple[Arrays, tuple[jax.Array, Arrays, jax.Array]]:
    return _products(rows, weights, group_sizes, axis), (rows, weights, group_sizes)


def _backward(
    axis: int, residuals: tuple[jax.Array, Arrays, jax.Array], d_products: Arrays
) -> tuple[jax.Array, Arrays, None]:
    rows, weights, group_sizes = residuals
    (d_rows,) = _walk_products(d_products, weights, group_sizes, 3 - axis)
    d_weights = _walk_gradients(rows, d_products, weights, group_sizes, axis)
    return d_rows, d_weights, None


_products.defvjp(_forward, _backward)


def _walk_products(inputs: Arrays, weights: Arrays, group_sizes: jax.Array, axis: int) -> Arrays:
    """Multiply one input with each of the weights, or sum the products of as many inputs."""
    num_rows, dtype = inputs[0].shape[0], inputs[0].dtype
    sizes = block_sizes(num_rows, group_sizes.size)
    starts = jnp.cumsum(group_sizes) - group_sizes
    is_sum = len(inputs) == len(weights)
    widths = [weight.shape[3 - axis] for weight in weights]

    def expert_body(expert: jax.Array, outputs: Arrays) -> Arrays:
        slices = [
            load(lax.dynamic_index_in_dim(store(w), expert, 0, keepdims=False), w.dtype)
            for w in weights
        ]
        end = starts[expert] + group_sizes[expert]

        def step(start: jax.Array, size: int, is_partial: bool, outputs: Arrays) -> Arrays:
            # At the end of the array the block moves left, over rows that the mask protects.
            first = jnp.minimum(start, num_rows - size) if is_partial else start
            blocks = [_block(x, first, size) for x in inputs]
            products = _block_products(blocks, slices, axis, is_sum)
            mask = inside(first, size, start, end) if is_partial else None
            return tuple(
                _write(output, store(product.astype(dtype)), first, mask)
                for output, product in zip(outputs, products, strict=True)
            )

        return walk_blocks(starts[expert], group_sizes[expert], sizes, step, outputs)

    widths = widths[:1] if is_sum else widths
    zeros = tuple(
        zeros_after(inputs[0], (num_rows, width), stored_as(dtype), salt)
        for salt, width in enumerate(widths)
    )
    return tuple(load(x, dtype) for x in walk_experts(group_sizes, expert_body, zeros))


def _block_products(
    blocks: list[jax.Array], slices: list[jax.Array], axis: int, is_sum: bool
) -> list[jax.Array]:
    if not is_sum:
        return [_dot(blocks[0], weight, axis - 1) for weight in slices]
    terms = [_dot(x, weight, axis - 1) for x, weight in zip(blocks, slices, strict=True)]
    return [reduce(jnp.add, terms)]


def _walk_gradients(
    rows: jax.Array, d_products: Arrays, weights: Arrays, group_sizes: jax.Array, axis: int
) -> Arrays:
    """Sum, for each expert, the outer products of its rows and their cotangents."""
    num_rows = rows.shape[0]
    sizes = block_sizes(num_rows, group_sizes.size)
    starts = jnp.cumsum(group_sizes) - group_sizes

    def expert_body(expert: jax.Array, gradients: Arrays) -> Arrays:
        end = starts[expert] + group_sizes[expert]

        def outer(first: jax.Array, size: int, mask: jax.Array | None) -> Arrays:
            blocks = [_block(x, first, size, mask) for x in (rows, *d_products)]
            return tuple(_outer(blocks[0], d_block, axis) for d_block in blocks[1:])

        def step(start: jax.Array, size: int, is_partial: bool, sums: Arrays) -> Arrays:
            return tuple(map(jnp.add, sums, outer(start, size, None)))

        # The last, partial block comes first: it makes the sums, which need no zeros then.
        smallest = sizes[-1]
        whole = (group_sizes[expert] - 1) // smallest * smallest
        tail = starts[expert] + whole
        first = jnp.minimum(tail, num_rows - smallest)
        sums = outer(first, smallest, inside(first, smallest, tail, end))
        sums = walk_blocks(starts[expert], whole, sizes, step, sums)
        narrow = [store(s.astype(w.dtype)) for s, w in zip(sums, weights, strict=True)]
        return tuple(
            lax.dynamic_update_index_in_dim(gradient, total, expert, 0)
            for gradient, total in zip(gradients, narrow, strict=True)
        )

    zeros = tuple(
        zeros_after(d_products[0], weight.shape, stored_as(weight.dtype), salt)
        for salt, weight in enumerate(weights)
    )
    gradients = walk_experts(group_sizes, expert_body, zeros)
    return tuple(load(g, w.dtype) for g, w in zip(gradients, weights, strict=True))


def _block(
    rows: jax.Array, first: jax.Array, size: int, mask: jax.Array | None = None
) -> jax.Array:
    block = lax.dynamic_slice_in_dim(store(rows), first, size)
    return load(block if mask is None else jnp.where(mask, block, 0), rows.dtype)


def _dot(block: jax.Array, weight: jax.Array, contracting_axis: int) -> jax.Array:
    if contracting_axis == 1 and block.shape[0] <= _FEW_ROWS and block.dtype.itemsize >= 4:
        return _barrier(_product(weight, _transposed(block), 0)).T
    return _product(block, weight, contracting_axis)


def _product(left: jax.Array, right: jax.Array, right_axis: int) -> jax.Array:
    dimensions = (((1,), (right_axis,)), ((), ()))
    kind = accumulator(left.dtype)
    return lax.dot_general(left, right, dimensions, preferred_element_type=kind)


def _outer(block: jax.Array, d_block: jax.Array, axis: int) -> jax.Array:
    left, right = (block, d_block) if axis == 1 else (d_block, block)
    return _product(_transposed(left), right, 0)


def _transposed(block: jax.Array) -> jax.Array:
    # Folded into the product, the transpose would keep it from XLA's faster kernels, which can
    # also start from the sum so far.
    return load(_barrier(store(block).T), block.dtype)


def _write(
    output: jax.Array, block: jax.Array, first: jax.Array, mask: jax.Array | None
) -> jax.Array:
    if mask is not None:
        block = jnp.where(mask, block, lax.dynamic_slice_in_dim(output, first, block.shape[0]))
    return lax.dynamic_update_slice_in_dim(output, block, first, 0)
