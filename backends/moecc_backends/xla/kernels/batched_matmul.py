"""Expert matrix multiplication under a capacity: one batched product.

Every expert has the same number of slots; empty ones are zero rows that cost their share.  Rows are
made with `dispatch.gather_vjp.permute`, by `dispatch.permutation.capacity_permutation`.
"""

from __future__ import annotations

from functools import partial

import jax
from jax import lax
from jax.typing import DTypeLike

from moecc_backends.xla.trace.dtypes import accumulator


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def slot_matmul(
    slots: jax.Array, weights: jax.Array, contracting_axis: int, kind: DTypeLike | None = None
) -> jax.Array:
    """Multiply ``[experts, slots, a]`` with each expert's weights into ``[experts, slots, b]``.

    `weights` is ``[experts, a, b]`` with ``contracting_axis=1`` or ``[experts, b, a]`` with
    ``contracting_axis=2``; neither is transposed.  Several groups stand side by side in `slots`.
    Keep the operations between two products in this shape: XLA lets an elementwise operation
    overwrite its operand only where no reshape follows it.
    The result has the type of `slots`; products are asked for in `kind`, float32 at least by
    default.
    """
    return _batched(slots, weights, 2, contracting_axis, kind).astype(slots.dtype)


def _forward(
    slots: jax.Array, weights: jax.Array, contracting_axis: int, kind: DTypeLike | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return slot_matmul(slots, weights, contracting_axis, kind), (slots, weights)


def _backward(
    contracting_axis: int,
    kind: DTypeLike | None,
    residuals: tuple[jax.Array, jax.Array],
    d_products: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    slots, weights = residuals
    d_slots = slot_matmul(d_products, weights, 3 - contracting_axis, kind)
    left, right = (slots, d_products) if contracting_axis == 1 else (d_products, slots)
    return d_slots, _batched(left, right, 1, 1, kind).astype(weights.dtype)


slot_matmul.defvjp(_forward, _backward)


def _batched(
    left: jax.Array, right: jax.Array, left_axis: int, right_axis: int, kind: DTypeLike | None
) -> jax.Array:
    dimensions = (((left_axis,), (right_axis,)), ((0,), (0,)))
    wanted = kind or accumulator(left.dtype)
    return lax.dot_general(left, right, dimensions, preferred_element_type=wanted)
