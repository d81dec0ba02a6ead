"""Rows sorted by expert, multiplied group by group: by a loop over blocks, or `lax.ragged_dot`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, reduce
from math import prod

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moecc_backends.xla.dispatch.flat import (
    Permutation,
    gathered_matmul,
    rows_to_tokens,
    sort_by_expert,
    sorted_permutation,
    tokens_to_rows,
)
from moecc_backends.xla.kernels.grouped_matmul import grouped_matmul_of_parts, repeat_by_group
from moecc_backends.xla.mesh.all_to_all import ExchangeMap, ExchangeSpec
from moecc_backends.xla.trace.routing import Routing
from moecc_backends.xla.trace.values import (
    Deferred,
    DeferredRows,
    ExpertArrays,
    Named,
    Operand,
    Rows,
    accumulator,
    load,
    store,
)

# Move tokens into the experts' rows and back, with gradients that gather as well.
#
# The derivative that JAX would find for a gather is a scatter-add, which is slow everywhere and
# serial on a CPU.  The map is one-to-one, so the derivative is a gather in its other direction.


@jax.custom_vjp
def permute(tokens: jax.Array, permutation: Permutation) -> jax.Array:
    """Copy ``[tokens, embed]`` into ``[rows, embed]``; rows without a token are zero."""
    choice = permutation.choice_of_row
    return _take(tokens, permutation.token_of_row, choice >= 0)


def _permute_forward(
    tokens: jax.Array, permutation: Permutation
) -> tuple[jax.Array, tuple[Permutation]]:
    return permute(tokens, permutation), (permutation,)


def _permute_backward(residuals: tuple[Permutation], d_rows: jax.Array) -> tuple[jax.Array, None]:
    (permutation,) = residuals
    return _sum_choices(d_rows, permutation, None), None


permute.defvjp(_permute_forward, _permute_backward)


@jax.custom_vjp
def permute_choices(values: jax.Array, permutation: Permutation) -> jax.Array:
    """Copy ``[tokens, choice]`` into ``[rows]``; rows without a token have zero."""
    choice = permutation.choice_of_row
    return jnp.where(choice >= 0, jnp.take(values.reshape(-1), choice, mode="clip"), 0)


def _permute_choices_backward(
    residuals: tuple[Permutation], d_rows: jax.Array
) -> tuple[jax.Array, None]:
    row = residuals[0].row_of_choice
    return jnp.where(row >= 0, jnp.take(d_rows, row, mode="clip"), 0), None


permute_choices.defvjp(
    lambda values, permutation: (permute_choices(values, permutation), (permutation,)),
    _permute_choices_backward,
)


def sum_rows(rows: jax.Array, permutation: Permutation, gates: jax.Array | None) -> jax.Array:
    """Sum the rows ``[rows, embed]`` of each token, as they are or weighted with `gates`."""
    if gates is None:
        return unpermute_weighted(rows, permutation)
    return unpermute(rows, permutation, gates)


@jax.custom_vjp
def unpermute_weighted(rows: jax.Array, permutation: Permutation) -> jax.Array:
    """Sum the rows ``[rows, embed]`` of each token, of which nothing is kept for the gradient."""
    return _sum_choices(rows, permutation, None)


def _unpermute_weighted_backward(
    residuals: tuple[Permutation], d_tokens: jax.Array
) -> tuple[jax.Array, None]:
    (permutation,) = residuals
    return _take(d_tokens, permutation.token_of_row, permutation.choice_of_row >= 0), None


unpermute_weighted.defvjp(
    lambda rows, permutation: (unpermute_weighted(rows, permutation), (permutation,)),
    _unpermute_weighted_backward,
)


@jax.custom_vjp
def unpermute(rows: jax.Array, permutation: Permutation, gates: jax.Array) -> jax.Array:
    """Sum the rows ``[rows, embed]`` of each token, weighted with `gates` ``[tokens, choice]``.

    A choice without a row contributes nothing. The sum runs in float32 at least.
    """
    return _sum_choices(rows, permutation, gates)


def _unpermute_forward(
    rows: jax.Array, permutation: Permutation, gates: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, Permutation, jax.Array]]:
    return unpermute(rows, permutation, gates), (rows, permutation, gates)


def _unpermute_backward(
    residuals: tuple[jax.Array, Permutation, jax.Array], d_tokens: jax.Array
) -> tuple[jax.Array, None, jax.Array]:
    rows, permutation, gates = residuals
    has_row = permutation.choice_of_row >= 0
    gate_of_row = jnp.where(has_row, gates.reshape(-1)[permutation.choice_of_row], 0)
    d_rows = _take(d_tokens, permutation.token_of_row, has_row)
    d_rows = (gate_of_row[:, None] * d_rows).astype(rows.dtype)
    return d_rows, None, _gate_gradient(rows, permutation, d_tokens).astype(gates.dtype)


unpermute.defvjp(_unpermute_forward, _unpermute_backward)


def _take(values: jax.Array, index: jax.Array, is_valid: jax.Array) -> jax.Array:
    # Clipping costs nothing; the mask, not the clipped index, decides what is read.
    taken = jnp.take(store(values), index, axis=0, mode="clip")
    return load(jnp.where(is_valid[:, None], taken, 0), values.dtype)


def _sum_choices(rows: jax.Array, permutation: Permutation, gates: jax.Array | None) -> jax.Array:
    # One term a choice, not one gather of all: XLA fuses the terms and stores none of them.
    kind = accumulator(rows.dtype)

    def term(choice: int) -> jax.Array:
        row = permutation.row_of_choice[:, choice]
        taken = _take(rows, row, row >= 0).astype(kind)
        return taken if gates is None else taken * gates[:, choice, None].astype(kind)

    terms = map(term, range(permutation.row_of_choice.shape[1]))
    return reduce(jnp.add, terms).astype(rows.dtype)


def _gate_gradient(rows: jax.Array, permutation: Permutation, d_tokens: jax.Array) -> jax.Array:
    kind = accumulator(rows.dtype)

    def column(choice: int) -> jax.Array:
        row = permutation.row_of_choice[:, choice]
        taken = _take(rows, row, row >= 0).astype(kind)
        return jnp.sum(taken * d_tokens.astype(kind), axis=-1)

    columns = map(column, range(permutation.row_of_choice.shape[1]))
    return jnp.stack(list(columns), axis=-1)


Kernel = Callable[[jax.Array, jax.Array, jax.Array, int, DTypeLike], jax.Array]
"""Multiplies rows ``[rows, a]`` with the weights of their group.

The weights are ``[experts, a, b]``, or ``[experts, b, a]`` where the axis that is summed over (the
fourth argument) is 2; the third argument is the group sizes, the last the type to ask for.
"""


@dataclass(frozen=True)
class SortedRows:
    """The rows of each expert one after the other; what has no slot has no row.

    Attributes:
      routing: what was routed.
      kernel: multiplies rows with the weights of their experts.
      permutation: the map between choices and rows.
      group_sizes: i32 ``[experts]``, how many rows each expert has.
      exchange: how rows came from other devices; None where nothing was exchanged.
      sends: how the rows of a round go to other devices; None where all rows go at once.
    """

    routing: Routing
    kernel: Kernel
    permutation: Permutation
    group_sizes: jax.Array
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
        return cls(routing, kernel, permutation, choices.group_sizes)

    @property
    def is_used(self) -> jax.Array:
        """Whether each row has a token: bool ``[rows]``."""
        return self.permutation.choice_of_row >= 0

    @property
    def is_full(self) -> bool:
        """Whether it is certain that every row has a token."""
        return self.routing.assigned is None

    @property
    def row_experts(self) -> jax.Array:
        """The expert of each row; rows that belong to none count to the last expert."""
        ends = jnp.cumsum(self.group_sizes)
        rows = jnp.arange(self.permutation.choice_of_row.size, dtype=ends.dtype)
        found = jnp.searchsorted(ends, rows, side="right", method="compare_all")
        return jnp.minimum(found, self.group_sizes.size - 1)

    @property
    def row_groups(self) -> jax.Array:
        """The group of the token of each row; the first where the row has none."""
        return self.routing.row_groups(self.permutation.token_of_row)

    def by_expert(self, values: jax.Array) -> jax.Array:
        """Repeat what each expert has over its rows."""
        return repeat_by_group(values, self.group_sizes, self.permutation.choice_of_row.size)

    def permute(self, x: Named) -> Rows:
        """Gather rows from tokens, forward and backward."""
        return tokens_to_rows(self, x, lambda tokens: permute(tokens, self.permutation))

    def permute_gates(self, gates: jax.Array) -> Rows:
        """Gather the gates of rows from those of choices."""
        return Rows(permute_choices(gates, self.permutation), (), self)

    def unpermute(self, rows: Operand | DeferredRows, gates: jax.Array | None) -> Named:
        """Gather the rows of each token, forward and backward."""
        assert isinstance(rows, Rows), "`permute` made rows"
        return rows_to_tokens(
            self.routing, rows, lambda flat: sum_rows(flat, self.permutation, gates)
        )

    def of_experts(self, first: jax.Array | int, count: int) -> SortedRows:
        """Return the rows of `count` experts from `first` on, sorted again."""
        return SortedRows.of(self.routing.of_experts(first, count), self.kernel)

    def matmul(self, x: Rows, weight: Named, over: tuple[str, ...], kind: DTypeLike) -> Rows:
        """Multiply rows with the weights of their experts, group by group."""

        def product(flat: jax.Array, matrices: Matrices, axis: int) -> jax.Array:
            # Each row stands for as many as its other axes have entries.
            times = flat.shape[0] // max(x.array.shape[0], 1)
            counts = self.group_sizes * times
            if isinstance(matrices, tuple):
                parts = tuple(part.astype(flat.dtype) for part in matrices)
                return grouped_matmul_of_parts(flat, parts, counts, axis)
            return self.kernel(flat, matrices.astype(flat.dtype), counts, axis, kind)

        return flat_matmul(x, weight, over, product)


@dataclass(frozen=True)
class ExchangeRecord:
    """How rows came from the devices of their tokens to those of their experts.

    Attributes:
      origin: the layout before.
      map: offsets and sizes of the exchange.
      spec: its mesh axes and static sizes.
    """

    origin: SortedRows
    map: ExchangeMap
    spec: ExchangeSpec


Matrices = jax.Array | tuple[jax.Array, ...]


def flat_matmul(
    x: Rows,
    weight: Named,
    over: tuple[str, ...],
    product: Callable[[jax.Array, Matrices, int], jax.Array],
) -> Rows:
    """Multiply rows with the weights of their experts, by a product of flat rows and matrices.

    Args:
      x: the rows.
      weight: of each expert or group, over all axes `over`.
      over: what is summed over.
      product: makes ``[rows, b]`` of ``[rows, a]``, of matrices ``[experts, a, b]`` or
        ``[experts, b, a]``, and of the axis of these that is summed over.
    """
    if "group" in weight.axes or set(weight.axes) & set(x.axes) != set(over):
        return gathered_matmul(x, weight, over)
    rest = tuple(a for a in weight.axes if a not in over and a != "expert")
    kept = tuple(a for a in x.axes if a not in over)
    rows = x.inner().to(("rows", *kept, *over)).array
    lead, sizes = rows.shape[: 1 + len(kept)], tuple(weight.size(a) for a in rest)
    flat = rows.reshape(prod(lead), prod(rows.shape[len(lead) :]))
    made = product(flat, *_matrices(weight, over, rest))
    return x.with_array(made.reshape(*lead, *sizes), (*kept, *rest))


def _matrices(weight: Named, over: tuple[str, ...], rest: tuple[str, ...]) -> tuple[Matrices, int]:
    """Return weights as ``[experts, a, b]`` or ``[experts, b, a]``, and the axis of `over`.

    Whichever of the two stands last in the checkpoint stays last: nothing is transposed.  Where
    each expert has an array of its own, they are ``[a, b]`` or ``[b, a]``.
    """
    if isinstance(weight, ExpertArrays):
        # Each is one of several experts, so they all are laid out as one of one expert is.
        ones = [Named(part[None], weight.axes) for part in weight.parts]
        made = [_matrices(one, over, rest) for one in ones]
        return tuple(array[0] for array, _ in made), made[0][1]
    inner_last = weight.axes[-1] in over
    order = ("expert", *rest, *over) if inner_last else ("expert", *over, *rest)
    width, out = (prod(weight.size(a) for a in axes) for axes in (over, rest))
    shape = (out, width) if inner_last else (width, out)
    array = weight.to(order).array.reshape(weight.size("expert"), *shape)
    return array, 2 if inner_last else 1


# What strategies share whose rows are not made at `dispatch`, but when they are combined.


@dataclass(frozen=True)
class Deferral:
    """A routing whose rows, and what becomes of them, are deferred until `unpermute`.

    Attributes:
      routing: what was routed.
    """

    routing: Routing

    @cached_property
    def _deferred(self) -> Deferred:
        return Deferred(self.routing)

    def permute(self, x: Named) -> Deferred:
        """Make nothing: rows are made when they are combined."""
        return self._deferred

    def permute_gates(self, gates: jax.Array) -> Deferred:
        """Make nothing yet, as of rows."""
        return self._deferred
