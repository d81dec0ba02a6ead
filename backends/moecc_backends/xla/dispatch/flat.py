"""Named arrays as the flat ones that strategies move: tokens, slots and rows ``[…, width]``."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from moecc_backends.xla.trace.arrays import einsum, per_row
from moecc_backends.xla.trace.routing import Routing
from moecc_backends.xla.trace.values import SLOT_AXES, Named, RowLayout, Rows

Move = Callable[[Array], Array]


def tokens_to_slots(routing: Routing, x: Named, move: Move) -> Named:
    """Return slots, which `move` makes ``[expert * group * slot, width]`` of tokens."""
    tokens, inner, sizes = flat_tokens(routing, x)
    return Named(move(tokens).reshape(*routing.slot_shape, *sizes), (*SLOT_AXES, *inner))


def slots_to_tokens(routing: Routing, slots: Named, move: Move) -> Named:
    """Return tokens, which `move` makes ``[tokens, width]`` of slots."""
    inner = tuple(a for a in slots.axes if a not in SLOT_AXES)
    array = slots.to((*SLOT_AXES, *inner)).array
    return _tokens(routing, array.reshape(prod(array.shape[:3]), *array.shape[3:]), inner, move)


def tokens_to_rows(layout: RowLayout, x: Named, move: Move) -> Rows:
    """Return rows of `layout`, which `move` makes ``[rows, width]`` of tokens."""
    tokens, inner, sizes = flat_tokens(layout.routing, x)
    return Rows(move(tokens).reshape(-1, *sizes), inner, layout)


def rows_to_tokens(routing: Routing, rows: Rows, move: Move) -> Named:
    """Return tokens, which `move` makes ``[tokens, width]`` of rows."""
    return _tokens(routing, rows.array, rows.axes, move)


def _tokens(routing: Routing, rows: Array, inner: tuple[str, ...], move: Move) -> Named:
    axes, sizes = (*routing.tokens, *inner), rows.shape[1:]
    shape = (*routing.token_sizes, *sizes)
    if not routing.num_tokens:
        # From no rows at all nothing can be gathered.
        return Named(jnp.zeros(shape, rows.dtype), axes)
    return Named(move(rows.reshape(rows.shape[0], prod(sizes))).reshape(shape), axes)


def gathered_matmul(x: Rows, weight: Named, over: tuple[str, ...]) -> Rows:
    """Multiply each row with a copy of its expert's weights.

    The copies are large: for few rows, or a product so odd that they are small.
    """
    product = einsum(x.inner(), per_row(weight, x.layout), over)
    inner = tuple(a for a in product.axes if a != "rows")
    return x.with_array(product.to(("rows", *inner)).array, inner)


def flat_tokens(routing: Routing, x: Named) -> tuple[Array, tuple[str, ...], tuple[int, ...]]:
    """Return tokens ``[tokens, width]``, and the axes and sizes that the width is made of."""
    inner = tuple(a for a in x.axes if a not in routing.tokens)
    source = x.to((*routing.tokens, *inner)).array
    sizes = source.shape[len(routing.tokens) :]
    return source.reshape(routing.num_tokens, prod(sizes)), inner, sizes


# Which choice has which row: sorted by expert, or in slots under a capacity.
#
# A *choice* is one (token, k) pair, counted ``token * choices + k``. A *row* is a row of the array
# that the experts work on. Both ways of routing are the same partial one-to-one map between the
# two, kept in both directions, so that moving rows forward and backward are gathers.

_INT32_MAX = 2**31 - 1


class SortedChoices(NamedTuple):
    """Choices in the order of their experts.

    Attributes:
      order: i32 ``[rows]``, the choice in each row; those without a slot come last.
      inverse: i32 ``[tokens, choice]``, the row of each choice.
      group_sizes: i32 ``[experts]``, how many rows each expert has.
    """

    order: Array
    inverse: Array
    group_sizes: Array


class RowPermutation(NamedTuple):
    """A partial one-to-one map between choices and rows; -1 stands for "none".

    Attributes:
      choice_of_row: i32 ``[rows]``.
      row_of_choice: i32 ``[tokens, choice]``.
    """

    choice_of_row: Array
    row_of_choice: Array

    @property
    def token_of_row(self) -> Array:
        """The token of each row, i32 ``[rows]``; negative where the row has none."""
        return self.choice_of_row // self.row_of_choice.shape[1]


def sort_by_expert(
    experts: Array, num_experts: int, assigned: Array | None = None
) -> SortedChoices:
    """Sort the choices ``[tokens, choice]`` by expert, ties in the order of the choices.

    Expert and choice make one int32 key, which sorts about four times as fast on a CPU
    as a stable argsort; where they do not fit into 31 bits, the stable argsort does it.
    `assigned` (bool ``[tokens, choice]``) leaves choices out.
    """
    keys = experts.reshape(-1).astype(jnp.int32)
    if assigned is not None:
        keys = jnp.where(assigned.reshape(-1), keys, num_experts)
    index = jnp.arange(keys.size, dtype=jnp.int32)
    order = _order(keys, index, num_experts)
    inverse = jnp.zeros_like(index).at[order].set(index, unique_indices=True)
    group_sizes = jnp.zeros(num_experts, jnp.int32).at[keys].add(1, mode="drop")
    return SortedChoices(order, inverse.reshape(experts.shape), group_sizes)


def _order(keys: Array, index: Array, num_experts: int) -> Array:
    count = max(keys.size, 1)
    if (num_experts + 1) * count > _INT32_MAX:
        return jnp.argsort(keys, stable=True).astype(jnp.int32)
    return lax.rem(lax.sort(keys * count + index, is_stable=False), jnp.int32(count))


def rank_in_expert(sorted_choices: SortedChoices, experts: Array) -> Array:
    """Count, for each choice ``[tokens, choice]``, the earlier choices of the same expert."""
    sizes = sorted_choices.group_sizes
    starts = jnp.cumsum(sizes) - sizes
    return sorted_choices.inverse - starts[experts]


def sorted_permutation(sorted_choices: SortedChoices) -> RowPermutation:
    """Give every choice its row of the sorted order; rows ``[tokens * choices]``."""
    order, inverse, group_sizes = sorted_choices
    num_assigned = jnp.sum(group_sizes)
    index = jnp.arange(order.size, dtype=jnp.int32)
    return RowPermutation(
        jnp.where(index < num_assigned, order, -1),
        jnp.where(inverse < num_assigned, inverse, -1),
    )


def capacity_permutation(
    experts: Array,
    slots: Array,
    num_experts: int,
    capacity: int,
    groups: int = 1,
    *,
    expert_major: bool = False,
) -> RowPermutation:
    """Give the choices ``[tokens, choice]`` their rows ``[groups * experts * capacity]``.

    `slots` is the slot of each choice within its group and expert, or -1 where it was dropped;
    a group is ``tokens / groups`` consecutive tokens.  The order of rows is ``[group, expert,
    slot]``, or with `expert_major` as ``[expert, group, slot]``, which a batched product over the
    experts takes without a transpose.
    """
    tokens = experts.shape[0]
    group = (jnp.arange(tokens, dtype=jnp.int32) // (tokens // groups))[:, None]
    expert = experts.astype(jnp.int32)
    block = expert * groups + group if expert_major else group * num_experts + expert
    row = jnp.where(slots >= 0, block * capacity + slots, -1).astype(jnp.int32)
    num_rows = groups * num_experts * capacity
    # A negative index would wrap around; one past the end is dropped.
    target = jnp.where(row >= 0, row, num_rows).reshape(-1)
    choice = jnp.arange(row.size, dtype=jnp.int32)
    choice_of_row = jnp.full(num_rows, -1, jnp.int32).at[target].set(choice, mode="drop")
    return RowPermutation(choice_of_row, row)
