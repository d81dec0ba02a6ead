"""Layouts of rows: sorted by expert, in the order of the choices, or in slots under a capacity.

Ragged rows also cross devices, to the experts that they chose and back.  Each device has its rows
sorted by expert, so what goes to a peer is one run.  A peer gets a run from every device, and sorts
the rows by expert again.  Both ways are the same partial one-to-one map, so the derivative of one
is the other, and nothing is scattered or counted again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from math import nan, prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from moecc_backends.xla.kernels.grouped_matmul import (
    grouped_matmul_of_parts,
    repeat_by_group,
    starts_of,
)
from moecc_backends.xla.trace.values import (
    SLOT_AXES,
    Arrays,
    Deferred,
    DeferredRows,
    DispatchLayout,
    ExpertArrays,
    Named,
    Names,
    Operand,
    Routing,
    RowLayout,
    Rows,
    accumulator,
    gathered_matmul,
    load,
    padded,
    store,
    varies,
)

Move = Callable[[Array], Array]


def tokens_to_rows(layout: RowLayout, x: Named, move: Move) -> Rows:
    """Return rows of `layout`, which `move` makes ``[rows, width]`` of tokens."""
    tokens, inner, sizes = flat_tokens(layout.routing, x)
    return Rows(move(tokens).reshape(-1, *sizes), inner, layout)


def rows_to_tokens(routing: Routing, rows: Array, inner: Names, move: Move) -> Named:
    """Return tokens, which `move` makes ``[tokens, width]`` of rows ``[rows, *inner]``."""
    axes, sizes = (*routing.tokens, *inner), rows.shape[1:]
    shape = (*routing.token_sizes, *sizes)
    if not routing.num_tokens:
        # From no rows at all nothing can be gathered.
        return Named(jnp.zeros(shape, rows.dtype), axes)
    return Named(move(rows.reshape(rows.shape[0], prod(sizes))).reshape(shape), axes)


def flat_tokens(routing: Routing, x: Named) -> tuple[Array, Names, tuple[int, ...]]:
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
    index, count = jnp.arange(keys.size, dtype=jnp.int32), max(keys.size, 1)
    if (num_experts + 1) * count > _INT32_MAX:
        order = jnp.argsort(keys, stable=True).astype(jnp.int32)
    else:
        order = lax.rem(lax.sort(keys * count + index, is_stable=False), jnp.int32(count))
    inverse = jnp.zeros_like(index).at[order].set(index, unique_indices=True)
    group_sizes = jnp.zeros(num_experts, jnp.int32).at[keys].add(1, mode="drop")
    return SortedChoices(order, inverse.reshape(experts.shape), group_sizes)


def rank_in_expert(sorted_choices: SortedChoices, experts: Array) -> Array:
    """Count, for each choice ``[tokens, choice]``, the earlier choices of the same expert."""
    return sorted_choices.inverse - starts_of(sorted_choices.group_sizes)[experts]


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


# Move tokens into the experts' rows and back, with gradients that gather as well.
#
# The derivative that JAX would find for a gather is a scatter-add, which is slow everywhere and
# serial on a CPU.  The map is one-to-one, so the derivative is a gather in its other direction.


@jax.custom_vjp
def sum_rows(rows: Array, permutation: RowPermutation, gates: Array | None) -> Array:
    """Sum the rows ``[rows, embed]`` of each token, weighted with `gates` ``[tokens, choice]``.

    Without gates they are summed as they are.  A choice without a row contributes nothing.  The sum
    runs in float32 at least.
    """
    kind = accumulator(rows.dtype)
    terms = (
        term.astype(kind)
        if gates is None
        else term.astype(kind) * gates[:, choice, None].astype(kind)
        for choice, term in enumerate(_terms(rows, permutation))
    )
    return reduce(jnp.add, terms).astype(rows.dtype)


def _sum_rows_backward(
    residuals: tuple[Array | None, RowPermutation, Array | None], d_tokens: Array
) -> tuple[Array, None, Array | None]:
    rows, permutation, gates = residuals
    has_row = permutation.choice_of_row >= 0
    d_rows = _take(d_tokens, permutation.token_of_row, has_row)
    if rows is None or gates is None:
        return d_rows, None, None
    kind = accumulator(rows.dtype)
    gate_of_row = jnp.where(has_row, gates.reshape(-1)[permutation.choice_of_row], 0)
    d_gates = [
        jnp.sum(term.astype(kind) * d_tokens.astype(kind), axis=-1)
        for term in _terms(rows, permutation)
    ]
    d_rows = (gate_of_row[:, None] * d_rows).astype(rows.dtype)
    return d_rows, None, jnp.stack(d_gates, axis=-1).astype(gates.dtype)


# Without gates nothing of the rows is kept for the gradient.
sum_rows.defvjp(
    lambda rows, permutation, gates: (
        sum_rows(rows, permutation, gates),
        (None if gates is None else rows, permutation, gates),
    ),
    _sum_rows_backward,
)


@jax.custom_vjp
def permute(tokens: Array, permutation: RowPermutation) -> Array:
    """Copy ``[tokens, embed]`` into ``[rows, embed]``; rows without a token are zero."""
    return _take(tokens, permutation.token_of_row, permutation.choice_of_row >= 0)


permute.defvjp(
    lambda tokens, permutation: (permute(tokens, permutation), permutation),
    lambda permutation, d_rows: (sum_rows(d_rows, permutation, None), None),
)


@jax.custom_vjp
def permute_choices(values: Array, permutation: RowPermutation) -> Array:
    """Copy ``[tokens, choice]`` into ``[rows]``; rows without a token have zero."""
    choice = permutation.choice_of_row
    return jnp.where(choice >= 0, jnp.take(values.reshape(-1), choice, mode="clip"), 0)


def _permute_choices_backward(permutation: RowPermutation, d_rows: Array) -> tuple[Array, None]:
    row = permutation.row_of_choice
    return jnp.where(row >= 0, jnp.take(d_rows, row, mode="clip"), 0), None


permute_choices.defvjp(
    lambda values, permutation: (permute_choices(values, permutation), permutation),
    _permute_choices_backward,
)


def _take(values: Array, index: Array, is_valid: Array) -> Array:
    # Clipping costs nothing; the mask, not the clipped index, decides what is read.
    rows = jnp.take(store(values), index, axis=0, mode="clip")
    return load(jnp.where(is_valid[:, None], rows, 0), values.dtype)


def _terms(rows: Array, permutation: RowPermutation) -> Iterator[Array]:
    """Yield the rows of the tokens' first choices, of their second ones, and so on."""
    # One gather a choice, not one of all: XLA fuses the terms of a sum and stores none of them.
    for choice in range(permutation.row_of_choice.shape[1]):
        row = permutation.row_of_choice[:, choice]
        yield _take(rows, row, row >= 0)


Kernel = Callable[[Array, Array, Array, int, DTypeLike], Array]
"""Multiplies rows ``[rows, a]`` with the weights of their group.

The weights are ``[experts, a, b]``, or ``[experts, b, a]`` where the axis that is summed over (the
fourth argument) is 2; the third argument is the group sizes, the last the type to ask for.
"""


@dataclass(frozen=True)
class PermutedRows(RowLayout):
    """Rows in the order of the choices: nothing is sorted, and weights are gathered by row.

    Attributes:
      permutation: the map between choices and rows.
    """

    permutation: RowPermutation

    @classmethod
    def unsorted(cls, routing: Routing) -> PermutedRows:
        """Leave each choice of `routing` where it is."""
        row = jnp.arange(routing.num_choices, dtype=jnp.int32)
        if routing.assigned is not None:
            row = jnp.where(routing.assigned.reshape(-1), row, -1)
        return cls(routing, RowPermutation(row, row.reshape(routing.experts.shape)))

    @property
    def is_used(self) -> Array:
        """Whether each row has a token: bool ``[rows]``."""
        return self.permutation.choice_of_row >= 0

    @property
    def is_full(self) -> bool:
        """Whether it is certain that every row has a token."""
        return self.routing.assigned is None

    @property
    def row_tokens(self) -> Array:
        """The token of each row; negative where the row has none."""
        return self.permutation.token_of_row

    @property
    def row_experts(self) -> Array:
        """The expert of each row; any expert where the row has no token."""
        experts = self.routing.experts.reshape(-1)
        return experts if self.is_full else jnp.where(self.is_used, experts, 0)

    def by_expert(self, values: Array) -> Array:
        """Gather the entry of each row's expert."""
        picked = jnp.take(values, self.row_experts, axis=0, mode="clip")
        return picked if self.is_full else padded(picked, self.is_used, None, 0)

    def permute(self, x: Named) -> Rows:
        """Gather rows from tokens, forward and backward."""
        return tokens_to_rows(self, x, lambda tokens: permute(tokens, self.permutation))

    def permute_gates(self, gates: Array) -> Rows:
        """Gather the gates of rows from the gates of choices."""
        return Rows(permute_choices(gates, self.permutation), (), self)

    def unpermute(self, rows: Operand | DeferredRows, gates: Array | None) -> Named:
        """Gather the rows of each token, forward and backward."""
        assert isinstance(rows, Rows), "`permute` made rows"

        def summed(flat: Array) -> Array:
            return sum_rows(flat, self.permutation, gates)

        return rows_to_tokens(self.routing, rows.array, rows.axes, summed)

    def of_experts(self, first: Array | int, count: int) -> PermutedRows:
        """Return the rows of `count` experts from `first` on; the others stay, unused."""
        return self.unsorted(self.routing.of_experts(first, count))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("routing", "permutation", "group_sizes", "exchange", "sends"),
    meta_fields=("kernel",),
)
@dataclass(frozen=True)
class SortedRows(PermutedRows):
    """The rows of each expert one after the other; choices without a slot have no row.

    Attributes:
      kernel: multiplies rows with the weights of their experts.
      group_sizes: i32 ``[experts]``, how many rows each expert has.
      exchange: how rows came from other devices; None where nothing was exchanged.
      sends: how the rows of a round go to other devices; None where all rows go at once.
    """

    kernel: Kernel
    group_sizes: Array
    exchange: ExchangeRecord | None = None
    sends: tuple[ExchangeMap, ExchangeSpec] | None = None

    @classmethod
    def of(cls, routing: Routing, kernel: Kernel) -> SortedRows:
        """Sort the choices of `routing`.

        Groups do not matter here: they bound what a capacity counts, and that is settled.
        """
        choices = sort_by_expert(routing.experts, routing.num_experts, routing.assigned)
        permutation = sorted_permutation(choices)
        if routing.num_slots is not None:
            # No more rows can be used than there are slots.
            permutation = permutation._replace(
                choice_of_row=permutation.choice_of_row[: routing.num_slots]
            )
        return cls(routing, permutation, kernel, choices.group_sizes)

    @property
    def row_experts(self) -> Array:
        """The expert of each row; rows that belong to none count to the last expert."""
        ends = jnp.cumsum(self.group_sizes)
        rows = jnp.arange(self.permutation.choice_of_row.size, dtype=ends.dtype)
        expert = jnp.searchsorted(ends, rows, side="right", method="compare_all")
        return jnp.minimum(expert, self.group_sizes.size - 1)

    def by_expert(self, values: Array) -> Array:
        """Repeat the entry of each expert over its rows."""
        return repeat_by_group(values, self.group_sizes, self.permutation.choice_of_row.size)

    def of_experts(self, first: Array | int, count: int) -> SortedRows:
        """Return the rows of `count` experts from `first` on, sorted again."""
        return SortedRows.of(self.routing.of_experts(first, count), self.kernel)

    def matmul(self, x: Rows, weight: Named, over: Names, kind: DTypeLike) -> Rows:
        """Multiply rows with the weights of their experts, group by group."""

        def product(flat: Array, matrices: Matrices, axis: int) -> Array:
            # Each row stands for as many as its other axes have entries.
            counts = self.group_sizes * (flat.shape[0] // max(x.array.shape[0], 1))
            if isinstance(matrices, tuple):
                parts = tuple(part.astype(flat.dtype) for part in matrices)
                return grouped_matmul_of_parts(flat, parts, counts, axis)
            return self.kernel(flat, matrices.astype(flat.dtype), counts, axis, kind)

        return flat_matmul(x, weight, over, product)


@dataclass(frozen=True)
class ExchangeRecord:
    """How rows came from the devices of their tokens to the devices of their experts.

    Attributes:
      origin: the layout before.
      map: offsets and sizes of the exchange.
      spec: its mesh axes and static sizes.
    """

    origin: SortedRows
    map: ExchangeMap
    spec: ExchangeSpec


Matrices = Array | Arrays


def flat_matmul(
    x: Rows,
    weight: Named,
    over: Names,
    product: Callable[[Array, Matrices, int], Array],
) -> Rows:
    """Multiply rows with the weights of their experts, by a product of flat rows and matrices.

    Args:
      x: the rows.
      weight: the weight of each expert or group, over all axes `over`.
      over: what is summed over.
      product: makes ``[rows, b]`` of ``[rows, a]``, of matrices ``[experts, a, b]`` or
        ``[experts, b, a]``, and of the axis of these that is summed over.
    """
    if "group" in weight.axes or set(weight.axes) & set(x.axes) != set(over):
        return gathered_matmul(x, weight, over)
    outer = tuple(a for a in x.axes if a not in over)
    columns = tuple(a for a in weight.axes if a not in over and a != "expert")
    rows = x.inner().to(("rows", *outer, *over)).array
    lead, sizes = rows.shape[: 1 + len(outer)], tuple(weight.size(a) for a in columns)
    flat = rows.reshape(prod(lead), prod(rows.shape[len(lead) :]))
    products = product(flat, *_matrices(weight, over, columns))
    return x.with_array(products.reshape(*lead, *sizes), (*outer, *columns))


def _matrices(weight: Named, over: Names, columns: Names) -> tuple[Matrices, int]:
    """Return weights as ``[experts, a, b]`` or ``[experts, b, a]``, and the axis of `over`.

    Whichever of the two stands last in the checkpoint stays last: nothing is transposed.  Where
    each expert has an array of its own, they are ``[a, b]`` or ``[b, a]``.
    """
    if isinstance(weight, ExpertArrays):
        # Each is one of several experts, so they all are laid out as the stack of one expert is.
        stacks = [_matrices(Named(part[None], weight.axes), over, columns) for part in weight.parts]
        return tuple(stack[0] for stack, _ in stacks), stacks[0][1]
    inner_last = weight.axes[-1] in over
    order = ("expert", *columns, *over) if inner_last else ("expert", *over, *columns)
    width, out = (prod(weight.size(a) for a in axes) for axes in (over, columns))
    shape = (out, width) if inner_last else (width, out)
    array = weight.to(order).array.reshape(weight.size("expert"), *shape)
    return array, 2 if inner_last else 1


# Strategies whose rows are not made at `dispatch`, but when they are combined.


@dataclass(frozen=True)
class Deferral(DispatchLayout):
    """A routing whose rows, with all operations on them, are deferred until `unpermute`."""

    @cached_property
    def _deferred(self) -> Deferred:
        return Deferred(self.routing)

    def permute(self, x: Named) -> Deferred:
        """Make nothing: rows are made when they are combined."""
        return self._deferred

    def permute_gates(self, gates: Array) -> Deferred:
        """Make nothing: gates are gathered when rows are combined."""
        return self._deferred


# Slots under a capacity, reached by index.


@dataclass(frozen=True)
class CapacitySlots(DispatchLayout):
    """Slots under a capacity, filled from an index of each, and read by one; so are gradients.

    Attributes:
      poison: put NaN into empty slots, in values and cotangents, to see that nothing reads them.
    """

    poison: bool = False

    @cached_property
    def permutation(self) -> RowPermutation:
        """The map between choices and slots, experts first, as a batched product takes them."""
        routing = self.routing
        experts, groups, limit = routing.slot_shape
        return capacity_permutation(
            routing.experts, routing.slots, experts, limit, groups, expert_major=True
        )

    def permute(self, x: Named) -> Named:
        """Gather slots from tokens.

        Values of empty slots are zeros, poisoned or not: an operation may sum over slots.
        """
        tokens, inner, sizes = flat_tokens(self.routing, x)
        rows = permute(tokens, self.permutation)
        slots = self._poisoned(rows, None, nan).reshape(*self.routing.slot_shape, *sizes)
        return Named(slots, (*SLOT_AXES, *inner))

    def permute_gates(self, gates: Array) -> Named:
        """Gather the gates of slots from the gates of choices."""
        rows = permute_choices(gates, self.permutation)
        slots = self._poisoned(rows, None, nan).reshape(self.routing.slot_shape)
        return Named(slots, SLOT_AXES)

    def unpermute(self, rows: Operand | DeferredRows, gates: Array | None) -> Named:
        """Gather the slots of each token."""
        assert isinstance(rows, Named), "slots have axes"
        inner = tuple(a for a in rows.axes if a not in SLOT_AXES)
        array = rows.to((*SLOT_AXES, *inner)).array
        slots = array.reshape(prod(array.shape[:3]), *array.shape[3:])

        def summed(flat: Array) -> Array:
            return sum_rows(self._poisoned(flat, nan, None), self.permutation, gates)

        return rows_to_tokens(self.routing, slots, inner, summed)

    def _poisoned(self, rows: Array, value: float | None, gradient: float | None) -> Array:
        if not self.poison:
            return rows
        return padded(rows, self.permutation.choice_of_row >= 0, value, gradient)


class ExchangeMap(NamedTuple):
    """The map of one exchange, as one device knows it; i32 arrays.

    Attributes:
      there: offsets and sizes of what is sent and received on the way to the experts; None where
        as many rows go to each device.
      back: those of the way back.
      arrival_of_row: the arrival of each row, by expert, or −1.
      row_of_arrival: the row of each arrival, or −1.
      group_sizes: ``[experts]``, the rows of each of this device's experts.
    """

    there: RaggedArgs | None
    back: RaggedArgs | None
    arrival_of_row: Array
    row_of_arrival: Array
    group_sizes: Array


class RaggedArgs(NamedTuple):
    """Four of the operands of ``jax.lax.ragged_all_to_all``, each i32 ``[devices]``."""

    input_offsets: Array
    send_sizes: Array
    output_offsets: Array
    recv_sizes: Array


@dataclass(frozen=True)
class ExchangeSpec:
    """What does not change during an exchange.

    Attributes:
      mesh: the mesh axes along which devices exchange rows.
      rows: how many rows a device has before it.
      arrivals: how many it has room for after it.
      is_emulated: whether the platform has no ragged exchange.
    """

    mesh: Names
    rows: int
    arrivals: int
    is_emulated: bool


def exchange_map(group_sizes: Array, mesh: Names, arrivals: int) -> ExchangeMap:
    """Return the map of an exchange along `mesh` of rows sorted by expert.

    Args:
      group_sizes: i32 ``[experts]``, the rows that this device has for each expert.
      mesh: the mesh axes; each device along them gets an equal run of the experts.
      arrivals: how many rows a device has room for.
    """
    sizes = lax.all_gather(group_sizes, mesh)
    device, devices = lax.axis_index(mesh), sizes.shape[0]
    by_device = sizes.reshape(devices, devices, -1).sum(2)
    sent, got = by_device[device], by_device[:, device]
    there = RaggedArgs(starts_of(sent), sent, starts_of(by_device, 0)[device], got)
    back = RaggedArgs(starts_of(got), got, starts_of(by_device, 1)[:, device], sent)
    count = sizes.shape[1] // devices
    parts = lax.dynamic_slice_in_dim(sizes, device * count, count, 1)
    arrived = starts_of(parts.reshape(-1)).reshape(parts.shape)
    return _sorted_map(parts, arrived, arrivals, there, back)


def _sorted_map(
    parts: Array,
    arrived: Array,
    count: int,
    there: RaggedArgs | None = None,
    back: RaggedArgs | None = None,
) -> ExchangeMap:
    """Return the map of rows that arrive device by device, and are sorted by expert then.

    Args:
      parts: ``[devices, experts]``, the rows that come from each device for each expert.
      arrived: where the first of them arrives.
      count: the number of arrivals.
      there: what is sent to the experts, where devices get different numbers of rows.
      back: what is sent back.
    """
    by_expert = starts_of(parts.T.reshape(-1)).reshape(parts.T.shape)
    return ExchangeMap(
        there,
        back,
        _matched(by_expert, arrived.T, parts.T, count),
        _matched(arrived, by_expert.T, parts, count),
        parts.sum(0),
    )


def round_map(sizes: Array, mesh: Names, first: Array, rows: int) -> ExchangeMap:
    """Return the map of the exchange of a round, in which any two devices exchange `rows` rows.

    Args:
      sizes: i32 ``[devices, experts]``, the rows that each device has for each expert.
      mesh: the mesh axes; each device along them gets an equal run of the experts.
      first: the first row of the round, of those for each device.
      rows: how many rows go to each device; those that are there come first.
    """
    devices, device = sizes.shape[0], lax.axis_index(mesh)
    runs = lax.dynamic_index_in_dim(sizes.reshape(devices, devices, -1), device, 1, False)
    ends = jnp.cumsum(runs, 1)
    starts, stops = (jnp.clip(at, first, first + rows) for at in (ends - runs, ends))
    parts = stops - starts
    arrived = starts_of(parts, 1) + jnp.arange(devices, dtype=jnp.int32)[:, None] * rows
    return _sorted_map(parts, arrived, devices * rows)


def _matched(mine: Array, theirs: Array, sizes: Array, count: int) -> Array:
    """Return for each of `count` rows in one order of runs its number in another, or −1 between.

    Args:
      mine: where each run begins in the one order; rising.
      theirs: where it begins in the other.
      sizes: how long it is.
      count: the number of rows.
    """
    starts, moved, lengths = (a.reshape(-1) for a in (mine, theirs, sizes))
    row = jnp.arange(count, dtype=jnp.int32)
    run = jnp.searchsorted(starts + lengths, row, side="right")
    bounded = jnp.minimum(run, starts.size - 1)
    is_there = (run < starts.size) & (row >= starts[bounded])
    return jnp.where(is_there, row - starts[bounded] + moved[bounded], -1).astype(jnp.int32)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def send(rows: Array, map: ExchangeMap, spec: ExchangeSpec) -> Array:
    """Bring rows ``[rows, width]`` to the devices of their experts: ``[arrivals, width]``.

    Rows that nothing arrives for are zero.
    """
    return _picked(_exchanged(rows, map.there, spec, spec.arrivals), map.arrival_of_row)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def send_back(rows: Array, map: ExchangeMap, spec: ExchangeSpec) -> Array:
    """Bring rows ``[arrivals, width]`` back to where `send` took them from: ``[rows, width]``."""
    return _exchanged(_picked(rows, map.row_of_arrival), map.back, spec, spec.rows)


send.defvjp(
    lambda rows, map, spec: (send(rows, map, spec), map),
    lambda spec, map, slope: (send_back(slope, map, spec), None),
)
send_back.defvjp(
    lambda rows, map, spec: (send_back(rows, map, spec), map),
    lambda spec, map, slope: (send(slope, map, spec), None),
)


def _picked(rows: Array, index: Array) -> Array:
    picked = jnp.take(rows, index, axis=0, mode="clip")
    return jnp.where((index >= 0)[:, None], picked, jnp.zeros((), rows.dtype))


def _exchanged(rows: Array, args: RaggedArgs | None, spec: ExchangeSpec, count: int) -> Array:
    if args is None:
        return lax.all_to_all(rows, spec.mesh, 0, 0, tiled=True)
    zeros = jnp.zeros((count, rows.shape[1]), rows.dtype)
    room = lax.pcast(zeros, tuple(sorted(varies(rows))), to="varying")
    exchange = emulated if spec.is_emulated else lax.ragged_all_to_all
    return exchange(rows, room, *args, axis_name=spec.mesh)


def emulated(
    operand: Array,
    output: Array,
    input_offsets: Array,
    send_sizes: Array,
    output_offsets: Array,
    recv_sizes: Array,
    *,
    axis_name: Names,
) -> Array:
    """Do as ``jax.lax.ragged_all_to_all``, which a CPU has not: gather all rows and pick.

    Every device sees the rows of all, so this tests a program and does not show its cost.
    """
    device = lax.axis_index(axis_name)
    every = lax.all_gather(operand, axis_name)
    starts, sizes, targets = (
        lax.all_gather(a, axis_name)[:, device] for a in (input_offsets, send_sizes, output_offsets)
    )
    row = jnp.arange(output.shape[0], dtype=jnp.int32)[:, None]
    is_there = (row >= targets) & (row < targets + sizes)
    sender = jnp.argmax(is_there, axis=1)
    source = row[:, 0] - targets[sender] + starts[sender]
    picked = every[sender, jnp.clip(source, 0, operand.shape[0] - 1)]
    return jnp.where(is_there.any(axis=1)[:, None], picked, output)
