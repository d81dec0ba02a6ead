"""Grouped matrix multiplication: each expert's rows times that expert's weights.

On a CPU (and on many GPUs) `lax.ragged_dot` multiplies every row with every expert.  Here a loop
over the experts that have rows takes one slice of the weights at a time and multiplies the rows in
a few large blocks.  The gradients are written by hand, because differentiating ``weights[expert]``
makes a zero-filled array of the size of all weights for every slice taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from moecc_backends.xla.trace.values import Arrays, accumulator, load, store, stored_as

# How the rows of one expert are cut into blocks that a compiled loop can multiply.
#
# XLA needs static shapes, and the number of rows that an expert gets is known at run time only. So
# every expert is walked in blocks of a few static sizes: large ones first, where only the smallest
# size may hold rows that are not the expert's, and only there is a mask needed; or one that covers
# what is left, where nothing is masked, since experts after it write over what it wrote too much.

Carry = TypeVar("Carry")

# step(start, size, is_partial, carry): multiply `size` rows from `start` on.
Step = Callable[[Array, int, bool, Carry], Carry]

# Measured on two AVX-512 cores: from 128 rows on, a product runs within a tenth of its best rate.
# Every further size costs about 0.05 s of compilation in each loop.
_LARGE = (512, 256, 192, 128, 64, 32)
_MEDIUM = (256, 64, 16)
_SMALL = (128, 32, 8)

_LARGEST_COVER, _FEW = 512, 192
"""Rows of the largest mean that sizes are made for, and of the least with sizes of its own."""


def block_sizes(num_rows: int, num_experts: int) -> tuple[int, ...]:
    """Choose descending block sizes for `num_rows` rows of `num_experts` experts.

    Large blocks are offered even where the mean is small, so that a router that sends
    everything to one expert costs no more than a balanced one.  None holds all rows, if another
    does for it: it would start at the first row in every turn, and XLA makes what no turn changes
    before the loop, even for experts for which that has no turns.
    """
    mean = num_rows / num_experts
    sizes = _LARGE if mean >= 128 else _MEDIUM if mean >= 32 else _SMALL
    largest = min(num_rows, max(mean, 256))
    return tuple(size for size in sizes if size <= largest and size < num_rows) or (num_rows,)


def walk_blocks(
    start: Array, count: Array, sizes: tuple[int, ...], step: Step[Carry], carry: Carry
) -> Carry:
    """Run `step` over blocks that cover the rows ``start … start + count - 1``.

    Every size is a loop of its own, possibly of no turns: unlike a branch, a loop updates its
    carry in place.
    """
    for size in sizes:
        is_partial = size == sizes[-1]
        turns = (count + size - 1) // size if is_partial else count // size

        def body(turn: Array, carry: Carry, start: Array = start, size: int = size) -> Carry:
            return step(start + turn * size, size, size == sizes[-1], carry)

        carry = lax.fori_loop(0, turns, body, carry)
        start, count = start + turns * size, count - turns * size
    return carry


def cover_sizes(num_rows: int, num_experts: int) -> tuple[int, ...]:
    """Choose ascending sizes for `cover_blocks`, of `num_rows` rows of `num_experts` experts.

    Around the mean they are close, as a block is about as large as what an expert gets: what it
    has too many of is multiplied for nothing.
    """
    mean = min(num_rows / num_experts, _LARGEST_COVER)
    if mean < _FEW:
        sizes = [8, *range(16, 145, 16)]
    else:
        few = [_to_16(mean * share) for share in (1 / 8, 1 / 4, 1 / 2, 3 / 4)]
        step = 16 if mean < 2 * _FEW else 32
        sizes = [*few, *range(_to_16(mean * 7 / 8), _to_16(mean * 9 / 8) + 1, step)]
    enough = next((n for n, size in enumerate(sizes) if size >= num_rows), len(sizes) - 1)
    return tuple(sizes[: enough + 1])


def _to_16(rows: float) -> int:
    return 16 * max(1, round(rows / 16))


def overhang(sizes: tuple[int, ...]) -> int:
    """Return the largest number of rows by which a block of `cover_blocks` ends too late."""
    return max(size - low for low, size in pairwise((0, *sizes))) - 1


def cover_blocks(
    start: Array,
    count: Array,
    sizes: tuple[int, ...],
    step: Callable[[Array, int, Carry], Carry],
    carry: Carry,
) -> Carry:
    """Run ``step(first, size, carry)`` over blocks that cover `count` rows from `start` on.

    All but the last have the last size but one, and the last block the least size that holds what
    is left, so few blocks are small.  It may end beyond the rows: what a step writes there is
    overwritten by the next expert's, where experts are walked in order and an array has `overhang`
    rows more than there are.
    """
    usual = sizes[-2] if len(sizes) > 1 else sizes[-1]
    before = jnp.maximum(count - sizes[-1] + usual - 1, 0) // usual
    left = count - before * usual
    fits = [(left > low) & (left <= size) for low, size in pairwise((0, *sizes))]
    for size, is_last in sorted(zip(sizes, fits, strict=True), key=lambda s: s[0] != usual):
        times = is_last.astype(jnp.int32) + (before if size == usual else 0)
        first = start if size == usual else start + before * usual

        def body(turn: Array, carry: Carry, first: Array = first, size: int = size) -> Carry:
            # XLA makes what does not depend on the turn before the loop, even one of no turns.
            return step(first + turn * size, size, carry)

        carry = lax.fori_loop(0, times, body, carry)
    return carry


def starts_of(sizes: Array, axis: int = 0) -> Array:
    """Return where each of several runs begins that follow one another along an axis."""
    return jnp.cumsum(sizes, axis) - sizes


def walk_experts(group_sizes: Array, body: Callable[[Array, Carry], Carry], carry: Carry) -> Carry:
    """Run `body(expert, carry)` over the experts that have rows, and only over those.

    An expert without rows costs nothing, neither a product nor a read of its weights.
    """
    used = group_sizes > 0
    order = jnp.argsort(~used, stable=True)
    return lax.fori_loop(0, jnp.sum(used), lambda turn, c: body(order[turn], c), carry)


def inside(first: Array, size: int, start: Array, end: Array) -> Array:
    """Mask ``[size, 1]`` the rows from `first` on that are in ``start … end - 1``."""
    index = first + jnp.arange(size, dtype=first.dtype)
    return ((index >= start) & (index < end))[:, None]


def zeros_after(value: Array, shape: tuple[int, ...], dtype: DTypeLike, salt: int) -> Array:
    """Make zeros that exist only once `value` does, and that nothing else shares.

    XLA would merge equal constants, make them before anything else, and copy them for each loop
    that writes into one.  These it cannot: they are one if the first element of `value` is both
    NaN and equal to `salt`, and a different `salt` keeps zeros of the same shape apart.
    They also vary over the mesh axes that `value` does, as the carry of a loop must.
    """
    # Without elements there is a sum, at least, which varies likewise.
    first = load(store(value)[(0,) * value.ndim], value.dtype) if value.size else value.sum()
    never = (first != first) & (first == salt)
    return jnp.broadcast_to(never.astype(dtype), shape)


# Up to this many rows of 32 bits it is faster to transpose them, twice, than to have the product
# repack a weight whose last axis is summed over.
_FEW_ROWS = 32


def grouped_matmul(
    rows: Array,
    weights: Array,
    group_sizes: Array,
    contracting_axis: int,
    kind: DTypeLike | None = None,
) -> Array:
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
    rows: Array,
    weights: Arrays,
    group_sizes: Array,
    contracting_axis: int,
) -> Array:
    """Multiply rows as `grouped_matmul` does, with an array for each expert, read in place.

    `weights` are ``[a, b]`` with ``contracting_axis=1`` or ``[b, a]`` with ``contracting_axis=2``.
    Experts are written out one by one, so there should be few; and there is no gradient.
    """
    sizes = block_sizes(rows.shape[0], len(weights))
    # Each size is a loop for each expert, which take long to compile.
    two = tuple(dict.fromkeys((sizes[len(sizes) // 2], sizes[-1])))
    starts = starts_of(group_sizes)
    wide = weights[0].shape[2 - contracting_axis]
    output = jnp.zeros((rows.shape[0], wide), stored_as(rows.dtype))
    # Experts have one shape, so that jax traces and lowers the walk once.
    walk = jax.jit(_walk_rows, static_argnums=(2, 4))
    for number, weight in enumerate(weights):
        span = starts[number], group_sizes[number]
        output = walk(rows, weight, contracting_axis - 1, span, two, output)
    return load(output, rows.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product_of_groups(rows: Array, weights: Array, group_sizes: Array, axis: int) -> Array:
    return _walk_product(rows, weights, group_sizes, axis)


def _backward(
    axis: int, residuals: tuple[Array, Array, Array], d_product: Array
) -> tuple[Array, Array, None]:
    rows, weights, group_sizes = residuals
    d_rows = _walk_product(d_product, weights, group_sizes, 3 - axis)
    is_small = rows.shape[0] <= _FEW_ROWS and weights.dtype.itemsize >= 4
    gradient = _gradient_of_few if is_small else _walk_gradient
    return d_rows, gradient(rows, d_product, weights, group_sizes, axis), None


_product_of_groups.defvjp(
    lambda rows, weights, sizes, axis: (
        _product_of_groups(rows, weights, sizes, axis),
        (rows, weights, sizes),
    ),
    _backward,
)


def _walk_product(rows: Array, weights: Array, group_sizes: Array, axis: int) -> Array:
    """Multiply the rows of each expert with its weights."""
    sizes = block_sizes(rows.shape[0], group_sizes.size)
    starts = starts_of(group_sizes)

    def expert_body(expert: Array, output: Array) -> Array:
        stored = lax.dynamic_index_in_dim(store(weights), expert, 0, keepdims=False)
        weight, span = load(stored, weights.dtype), (starts[expert], group_sizes[expert])
        return _walk_rows(rows, weight, axis - 1, span, sizes, output)

    zeros = zeros_after(rows, (rows.shape[0], weights.shape[3 - axis]), stored_as(rows.dtype), 0)
    return load(walk_experts(group_sizes, expert_body, zeros), rows.dtype)


def _walk_rows(
    rows: Array,
    weight: Array,
    axis: int,
    span: tuple[Array, Array],
    sizes: tuple[int, ...],
    output: Array,
) -> Array:
    """Write the products of one expert's rows, of which `span` is the first and the number."""
    num_rows, (begin, count) = rows.shape[0], span

    def step(start: Array, size: int, is_partial: bool, output: Array) -> Array:
        # At the end of the array the block moves left, over rows that the mask protects.
        first = jnp.minimum(start, num_rows - size) if is_partial else start
        product = block_product(_block(rows, first, size), weight, axis)
        block = store(product.astype(rows.dtype))
        if is_partial:
            mask = inside(first, size, start, begin + count)
            block = jnp.where(mask, block, lax.dynamic_slice_in_dim(output, first, size))
        return lax.dynamic_update_slice_in_dim(output, block, first, 0)

    return walk_blocks(begin, count, sizes, step, output)


def _walk_gradient(
    rows: Array, d_product: Array, weights: Array, group_sizes: Array, axis: int
) -> Array:
    """Sum, for each expert, the outer products of its rows and their cotangents."""
    num_rows = rows.shape[0]
    sizes = block_sizes(num_rows, group_sizes.size)
    starts = starts_of(group_sizes)

    def expert_body(expert: Array, gradient: Array) -> Array:
        end = starts[expert] + group_sizes[expert]

        def outer(first: Array, size: int, mask: Array | None) -> Array:
            block, d_block = (_block(x, first, size, mask) for x in (rows, d_product))
            return outer_product(block, d_block, axis)

        def step(start: Array, size: int, is_partial: bool, total: Array) -> Array:
            return total + outer(start, size, None)

        # The last, partial block comes first: it makes the sum, which needs no zeros then.
        smallest = sizes[-1]
        full_rows = (group_sizes[expert] - 1) // smallest * smallest
        tail = starts[expert] + full_rows
        first = jnp.minimum(tail, num_rows - smallest)
        total = outer(first, smallest, inside(first, smallest, tail, end))
        total = walk_blocks(starts[expert], full_rows, sizes, step, total)
        narrow = store(total.astype(weights.dtype))
        return lax.dynamic_update_index_in_dim(gradient, narrow, expert, 0)

    zeros = zeros_after(d_product, weights.shape, stored_as(weights.dtype), 0)
    return load(walk_experts(group_sizes, expert_body, zeros), weights.dtype)


def _gradient_of_few(
    rows: Array, d_product: Array, weights: Array, group_sizes: Array, axis: int
) -> Array:
    """Return the result of `_walk_gradient` for few rows: any expert could have all of them.

    Gradients are larger than what they are made of, and a loop writes them twice.  Sums of narrow
    ones would be an array of twice their size.
    """
    starts = starts_of(group_sizes)
    numbers = jnp.arange(rows.shape[0], dtype=group_sizes.dtype)
    is_used = (numbers < group_sizes[:, None])[..., None]

    def of_experts(x: Array) -> Array:
        picked = jnp.take(store(x), starts[:, None] + numbers, axis=0, mode="clip")
        return load(jnp.where(is_used, picked, 0), x.dtype)

    left, right = of_experts(rows), of_experts(d_product)
    pair = (left, right) if axis == 1 else (right, left)
    over_rows = (((1,), (1,)), ((0,), (0,)))
    kind = accumulator(rows.dtype)
    outer = lax.dot_general(*pair, over_rows, preferred_element_type=kind)
    return outer.astype(weights.dtype)


def _block(rows: Array, first: Array, size: int, mask: Array | None = None) -> Array:
    block = lax.dynamic_slice_in_dim(store(rows), first, size)
    return load(block if mask is None else jnp.where(mask, block, 0), rows.dtype)


def block_product(block: Array, weight: Array, contracting_axis: int) -> Array:
    """Multiply a block of rows ``[rows, a]`` with one matrix; the sums are float32 at least.

    The matrix is ``[a, b]`` with ``contracting_axis=0``, or ``[b, a]`` with 1.
    """
    if contracting_axis == 1 and block.shape[0] <= _FEW_ROWS and block.dtype.itemsize >= 4:
        return lax.optimization_barrier(_product(weight, _transposed(block), 0)).T
    return _product(block, weight, contracting_axis)


def _product(left: Array, right: Array, right_axis: int) -> Array:
    dimensions = (((1,), (right_axis,)), ((), ()))
    kind = accumulator(left.dtype)
    return lax.dot_general(left, right, dimensions, preferred_element_type=kind)


def outer_product(block: Array, d_block: Array, axis: int) -> Array:
    """Sum the outer products of rows ``[rows, a]`` and their cotangents ``[rows, b]``.

    The result is ``[a, b]`` with ``axis=1``, or ``[b, a]`` with 2; it is float32 at least.
    """
    left, right = (block, d_block) if axis == 1 else (d_block, block)
    return _product(_transposed(left), right, 0)


def _transposed(block: Array) -> Array:
    # Folded into the product, the transpose would keep it from XLA's faster kernels, which can
    # also start from the sum so far.
    return load(lax.optimization_barrier(store(block).T), block.dtype)


# Rows times a matrix, with the gradients that are quick on a CPU.
#
# The gradient of the matrix is a sum over rows, a product of two arrays that both have the rows in
# front. XLA's CPU compiler needs 1.4 times as long for it where the second of them is the narrower
# (1,024 rows, widths 768 and 256, one thread), and makes a transposed copy of what it multiplies
# where the rows are several axes.


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rows_times(rows: Array, matrix: Array, at: int) -> Array:
    """Return ``[rows, b]``, the sum over ``a`` of ``rows [rows, a]`` times `matrix`.

    Args:
      rows: the rows; they, the matrix and the sums have one type.
      matrix: ``[a, b]``, or ``[b, a]``.
      at: the position of ``a`` in the matrix.
    """
    return lax.dot_general(rows, matrix, (((1,), (at,)), ((), ())))


def _row_product_backward(at: int, residuals: Arrays, slope: Array) -> Arrays:
    rows, matrix = residuals
    by_rows = lax.dot_general(slope, matrix, (((1,), (1 - at,)), ((), ())))
    x, y = (rows, slope) if at == 0 else (slope, rows)
    over_rows = (((0,), (0,)), ((), ()))
    if x.shape[1] <= y.shape[1]:
        return by_rows, lax.dot_general(x, y, over_rows)
    # Without the barrier the compiler would exchange the two again.
    turned = lax.optimization_barrier(lax.dot_general(y, x, over_rows))
    return by_rows, jnp.transpose(turned)


rows_times.defvjp(
    lambda rows, matrix, at: (rows_times(rows, matrix, at), (rows, matrix)), _row_product_backward
)


# Repeat what each expert has one of, a bias say, over the rows of that expert.

# Rows that a sum over a group takes at a time.
_SUMMED_ROWS = 128


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def repeat_by_group(values: Array, group_sizes: Array, num_rows: int) -> Array:
    """Repeat ``[experts, …]`` over the rows of each expert into ``[rows, …]``.

    Rows beyond the last group get the last expert's values; what their cotangent holds does not
    reach the gradient, which is a sum over each group in float32 at least.
    """
    ends = jnp.cumsum(group_sizes)
    expert = jnp.searchsorted(ends, jnp.arange(num_rows, dtype=ends.dtype), side="right")
    return load(jnp.take(store(values), expert, axis=0, mode="clip"), values.dtype)


def _repeat_by_group_backward(
    num_rows: int, residuals: tuple[Array, Array], d_rows: Array
) -> tuple[Array, None]:
    values, group_sizes = residuals
    flat = d_rows.reshape(num_rows, -1)
    stored = store(flat)
    starts = starts_of(group_sizes)
    size = min(num_rows, _SUMMED_ROWS)

    def expert_body(expert: Array, sums: Array) -> Array:
        end = starts[expert] + group_sizes[expert]

        def step(start: Array, size: int, is_partial: bool, total: Array) -> Array:
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


repeat_by_group.defvjp(
    lambda values, sizes, rows: (repeat_by_group(values, sizes, rows), (values, sizes)),
    _repeat_by_group_backward,
)


# Products of sorted rows by `lax.ragged_dot`, and where XLA has a kernel for it.
#
# Where it has none it masks the rows once for each expert and multiplies them all: as much
# arithmetic and memory as experts, which is right and slow.

_BLOCK = 2048
"""Rows of a gradient at a time: enough work for a product to hide reading and writing its sum."""

_LEAST_JAXLIB = (0, 11)
_LEAST_CUDNN = 92200
_LEAST_CAPABILITY = 8.0


def ragged_matmul(
    rows: Array,
    weights: Array,
    group_sizes: Array,
    contracting_axis: int,
    kind: DTypeLike | None = None,
) -> Array:
    """Multiply the rows ``[rows, a]`` of each group with the weights of its expert.

    `weights` is ``[experts, a, b]`` with ``contracting_axis=1`` or ``[experts, b, a]`` with
    ``contracting_axis=2``.  Beyond the last group, accelerators make anything; what `rows` holds
    there reaches no other row and no gradient of the weights.  Products are asked for in `kind`,
    float32 at least by default; a kernel writes them as such, and gradients have that type, too.
    """
    if contracting_axis == 2:
        weights = jnp.swapaxes(weights, 1, 2)
    wanted = jnp.dtype(kind or accumulator(rows.dtype))
    return _products(rows, weights, group_sizes, wanted).astype(rows.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _products(rows: Array, weights: Array, group_sizes: Array, kind: np.dtype[np.generic]) -> Array:
    return lax.ragged_dot(rows, weights, group_sizes, preferred_element_type=kind)


def _ragged_dot_backward(
    kind: np.dtype[np.generic], residuals: Arrays, d_products: Array
) -> tuple[Array, Array, None]:
    rows, weights, group_sizes = residuals
    narrow = d_products.astype(rows.dtype)
    d_rows = _products(narrow, jnp.swapaxes(weights, 1, 2), group_sizes, kind)
    d_weights = _outer_products(rows, narrow, group_sizes)
    return d_rows.astype(rows.dtype), d_weights.astype(weights.dtype), None


_products.defvjp(
    lambda rows, weights, sizes, kind: (
        _products(rows, weights, sizes, kind),
        (rows, weights, sizes),
    ),
    _ragged_dot_backward,
)


def _outer_products(rows: Array, d_products: Array, group_sizes: Array) -> Array:
    """Sum, for each group, the outer products of its rows and their cotangents.

    JAX's own derivative has a kernel nowhere: it multiplies all rows, once for each group.  Here a
    loop takes blocks of the rows that there are.  The sums run in float32 at least, one is stored:
    ``[groups, a, b]``, of the type of `rows`.
    """
    num_rows, kind = rows.shape[0], accumulator(rows.dtype)
    size = min(num_rows, _BLOCK)
    shape = rows.shape[1], d_products.shape[1]

    def of_group(run: Arrays) -> Array:
        start, count = run

        def step(turn: Array, total: Array) -> Array:
            # At the end of the array the block moves left, over rows that the mask leaves out.
            first = jnp.minimum(start + turn * size, num_rows - size)
            mask = inside(first, size, start + turn * size, start + count)
            left, right = (
                jnp.where(mask, lax.dynamic_slice_in_dim(x, first, size), 0)
                for x in (rows, d_products)
            )
            dimensions = (((0,), (0,)), ((), ()))
            return total + lax.dot_general(left, right, dimensions, preferred_element_type=kind)

        turns = (count + size - 1) // size
        total = lax.fori_loop(0, turns, step, zeros_after(d_products, shape, kind, 0))
        return total.astype(rows.dtype)

    return lax.map(of_group, (starts_of(group_sizes), group_sizes))


def why_no_kernel(platform: str, dtype: jax.typing.DTypeLike) -> str | None:
    """Return why XLA would multiply every row with every expert on `platform`, or None.

    A GPU has a kernel with jaxlib 0.11, cuDNN 9.22, compute capability 8.0 and 16-bit elements;
    of a GPU that is not attached nothing is known.
    """
    if platform == "tpu":
        return None
    if platform == "cpu":
        return "a CPU has no kernel for ragged_dot"
    if jnp.dtype(dtype).itemsize != 2:
        return "a GPU has a kernel for 16-bit elements only"
    installed = version("jaxlib")
    if tuple(map(int, installed.split(".")[:2])) < _LEAST_JAXLIB:
        return f"jaxlib {installed} has no kernel for a GPU, 0.11 has"
    if jax.default_backend() != "gpu":
        return "no GPU is here to be asked"
    gpu = jax.devices()[0]
    capability = float(getattr(gpu, "compute_capability", 0))
    if capability < _LEAST_CAPABILITY:
        return f"compute capability {capability}, 8.0 is needed"
    libraries = getattr(gpu.client, "platform_version", "")
    match = re.search(r"cudnn\D*(\d{5,6})", libraries, re.IGNORECASE)
    if match is None or int(match[1]) < _LEAST_CUDNN:
        return f"cuDNN 9.22 is needed, found {libraries.strip() or 'none'}"
    return None


# Expert matrix multiplication under a capacity: one batched product.
#
# Every expert has the same number of slots; empty ones are zero rows that cost their share. Rows
# are made by `permute` of `dispatch.sorted_rows`, along its `capacity_permutation`.


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def slot_matmul(
    slots: Array, weights: Array, contracting_axis: int, kind: DTypeLike | None = None
) -> Array:
    """Multiply ``[experts, slots, a]`` with each expert's weights into ``[experts, slots, b]``.

    `weights` is ``[experts, a, b]`` with ``contracting_axis=1`` or ``[experts, b, a]`` with
    ``contracting_axis=2``; neither is transposed.  Several groups stand side by side in `slots`.
    Keep the operations between two products in this shape: XLA lets an elementwise operation
    overwrite its operand only where no reshape follows it.
    The result has the type of `slots`; products are asked for in `kind`, float32 at least by
    default.
    """
    return _batched(slots, weights, 2, contracting_axis, kind).astype(slots.dtype)


def _batched_matmul_backward(
    contracting_axis: int,
    kind: DTypeLike | None,
    residuals: tuple[Array, Array],
    d_products: Array,
) -> tuple[Array, Array]:
    slots, weights = residuals
    d_slots = slot_matmul(d_products, weights, 3 - contracting_axis, kind)
    left, right = (slots, d_products) if contracting_axis == 1 else (d_products, slots)
    return d_slots, _batched(left, right, 1, 1, kind).astype(weights.dtype)


slot_matmul.defvjp(
    lambda slots, weights, axis, kind: (
        slot_matmul(slots, weights, axis, kind),
        (slots, weights),
    ),
    _batched_matmul_backward,
)


def _batched(
    left: Array, right: Array, left_axis: int, right_axis: int, kind: DTypeLike | None
) -> Array:
    dimensions = (((left_axis,), (right_axis,)), ((0,), (0,)))
    wanted = kind or accumulator(left.dtype)
    return lax.dot_general(left, right, dimensions, preferred_element_type=wanted)
