"""How the rows of one expert are cut into blocks that a compiled loop can multiply.

XLA needs static shapes, and the number of rows that an expert gets is known at run time only.
So every expert is walked in blocks of a few static sizes: large ones first, where only the smallest
size may hold rows that are not the expert's, and only there is a mask needed; or one that covers
what is left, where nothing is masked, since experts after it write over what it wrote too much.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from moecc_backends.xla.trace.dtypes import load, store

Carry = TypeVar("Carry")

# step(start, size, is_partial, carry): multiply `size` rows from `start` on.
Step = Callable[[jax.Array, int, bool, Carry], Carry]

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
    start: jax.Array, count: jax.Array, sizes: tuple[int, ...], step: Step[Carry], carry: Carry
) -> Carry:
    """Run `step` over blocks that cover the rows ``start … start + count - 1``.

    Every size is a loop of its own, possibly of no turns: unlike a branch, a loop updates its
    carry in place.
    """
    for size in sizes:
        is_partial = size == sizes[-1]
        turns = (count + size - 1) // size if is_partial else count // size

        def body(
            turn: jax.Array, carry: Carry, start: jax.Array = start, size: int = size
        ) -> Carry:
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
    """Return the most rows by which a block of `cover_blocks` ends beyond those that it covers."""
    return max(size - low for low, size in pairwise((0, *sizes))) - 1


def cover_blocks(
    start: jax.Array,
    count: jax.Array,
    sizes: tuple[int, ...],
    step: Callable[[jax.Array, int, Carry], Carry],
    carry: Carry,
) -> Carry:
    """Run ``step(first, size, carry)`` over blocks that cover `count` rows from `start` on.

    All but the last have the last size but one, and the last block the least size that holds what
    is left, so few blocks are small.  It may end beyond the rows: what a step writes there is
    overwritten by the next expert's, where experts are walked in order and an array has `overhang`
    rows more than there are.
    """
    whole = sizes[-2] if len(sizes) > 1 else sizes[-1]
    before = jnp.maximum(count - sizes[-1] + whole - 1, 0) // whole
    left = count - before * whole
    fits = [(left > low) & (left <= size) for low, size in pairwise((0, *sizes))]
    for size, is_last in sorted(zip(sizes, fits, strict=True), key=lambda s: s[0] != whole):
        times = is_last.astype(jnp.int32) + (before if size == whole else 0)
        first = start if size == whole else start + before * whole

        def body(
            turn: jax.Array, carry: Carry, first: jax.Array = first, size: int = size
        ) -> Carry:
            # XLA makes what does not depend on the turn before the loop, even one of no turns.
            return step(first + turn * size, size, carry)

        carry = lax.fori_loop(0, times, body, carry)
    return carry


def walk_experts(
    group_sizes: jax.Array, body: Callable[[jax.Array, Carry], Carry], carry: Carry
) -> Carry:
    """Run `body(expert, carry)` over the experts that have rows, and only over those.

    An expert without rows costs nothing, neither a product nor a read of its weights.
    """
    used = group_sizes > 0
    order = jnp.argsort(~used, stable=True)
    result = lax.fori_loop(0, jnp.sum(used), lambda turn, c: body(order[turn], c), carry)
    return cast(Carry, result)


def inside(first: jax.Array, size: int, start: jax.Array, end: jax.Array) -> jax.Array:
    """Mask ``[size, 1]`` the rows from `first` on that are in ``start … end - 1``."""
    index = first + jnp.arange(size, dtype=first.dtype)
    return ((index >= start) & (index < end))[:, None]


def zeros_after(value: jax.Array, shape: tuple[int, ...], dtype: DTypeLike, salt: int) -> jax.Array:
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
