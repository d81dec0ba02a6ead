"""All experts on all tokens, one expert after the other, and the gates pick.

It costs as many times the arithmetic as there are experts for each choice, and moves no row: the
oracle of the other strategies.  What stands between dispatch and combine is deferred until the
combine, which repeats it for each expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moecc.ir.graph import Value
from moecc.ir.traits import RowMove
from moecc_backends.xla.dispatch.flat import (
    Permutation,
    gathered_matmul,
    rows_to_tokens,
    tokens_to_rows,
)
from moecc_backends.xla.dispatch.sorted_rows import Deferral, permute, permute_choices, sum_rows
from moecc_backends.xla.trace.arrays import with_masked_gradient, zeroed
from moecc_backends.xla.trace.context import zeros_like_on_devices
from moecc_backends.xla.trace.routing import Routing
from moecc_backends.xla.trace.values import (
    DeferredRows,
    ExpertArrays,
    Named,
    Operand,
    Rows,
    accumulator,
)


@dataclass(frozen=True)
class AllExperts(Deferral):
    """A routing whose rows are not made at once."""

    def unpermute(self, rows: Operand | DeferredRows, gates: jax.Array | None) -> Named:
        """Return the sum over experts of their gated rows."""
        assert isinstance(rows, DeferredRows), "`permute` makes no rows"
        outside = rows.outside()
        sliced = {v: _leading(x) for v, x in sliced_by_expert(rows, outside).items()}
        axes: tuple[str, ...] = ()

        def weighted(expert: jax.Array, slices: tuple[jax.Array, ...]) -> jax.Array:
            nonlocal axes
            given = zip(sliced.items(), slices, strict=True)
            own = {v: Named(a, x.axes[1:]) for (v, x), a in given}
            layout = OneExpert(self.routing, expert)
            made = layout.unpermute(rows.make({**outside, **own}, layout), gates)
            axes = made.axes
            return made.array

        arrays = tuple(x.array for x in sliced.values())
        number = jnp.arange(self.routing.num_experts, dtype=jnp.int32)
        shape = jax.eval_shape(weighted, number[0], tuple(a[0] for a in arrays))
        zeros = zeros_like_on_devices(shape)
        total, _ = jax.lax.scan(
            lambda total, now: (total + weighted(*now), None), zeros, (number, arrays)
        )
        return Named(total, axes)

    def of_experts(self, first: jax.Array | int, count: int) -> AllExperts:
        """Return `count` experts from `first` on, for all tokens."""
        return AllExperts(self.routing.of_experts(first, count))


@dataclass(frozen=True)
class OneExpert:
    """All tokens as the rows of one expert; used are those that chose it.

    Attributes:
      routing: what was routed.
      expert: the number of the expert, which the scan counts.
    """

    routing: Routing
    expert: jax.Array

    @property
    def _is_choice(self) -> jax.Array:
        is_mine = self.routing.experts == self.expert
        assigned = self.routing.assigned
        return is_mine if assigned is None else is_mine & assigned

    @property
    def is_used(self) -> jax.Array:
        """Whether each token chose this expert and has a slot: bool ``[tokens]``."""
        return jnp.any(self._is_choice, axis=1)

    @property
    def is_full(self) -> bool:
        """False: some tokens chose another expert."""
        return False

    @property
    def row_experts(self) -> jax.Array:
        """The expert, for each token."""
        return jnp.broadcast_to(self.expert, (self.routing.num_tokens,))

    @property
    def row_groups(self) -> jax.Array:
        """The group of each token."""
        return self.routing.row_groups(jnp.arange(self.routing.num_tokens, dtype=jnp.int32))

    def by_expert(self, values: jax.Array) -> jax.Array:
        """Repeat what the expert has for each token."""
        return jnp.take(values, self.row_experts, axis=0, mode="clip")

    def permute(self, x: Named) -> Rows:
        """Return the tokens as they are; a gradient comes from those that chose the expert."""
        rows = tokens_to_rows(self, x, lambda tokens: with_masked_gradient(tokens, self.is_used))
        return replace(rows, are_tokens=True)

    def permute_gates(self, gates: jax.Array) -> Rows:
        """Return the mean of the gates by which each token chose the expert, or zero."""
        total = jnp.sum(jnp.where(self._is_choice, gates, 0), axis=1)
        return Rows(total / jnp.maximum(jnp.sum(self._is_choice, axis=1), 1), (), self)

    def unpermute(self, rows: Operand | DeferredRows, gates: jax.Array | None) -> Named:
        """Weight the rows of those who chose the expert; the result is float32 at least."""
        assert isinstance(rows, Rows), "`permute` made rows"
        return rows_to_tokens(self.routing, rows, lambda flat: self._weighted(flat, gates))

    def of_experts(self, first: jax.Array | int, count: int) -> OneExpert:
        """Return the same expert, as one of `count` from `first` on."""
        return OneExpert(self.routing.of_experts(first, count), self.expert - first)

    def matmul(self, x: Rows, weight: Named, over: tuple[str, ...], kind: DTypeLike) -> Rows:
        """Multiply each row with a copy of the weights that it is given."""
        return gathered_matmul(x, weight, over)

    def _weighted(self, rows: jax.Array, gates: jax.Array | None) -> jax.Array:
        kind = accumulator(rows.dtype)
        each = 1 if gates is None else gates.astype(kind)
        weight = jnp.sum(jnp.where(self._is_choice, each, 0).astype(kind), axis=1)
        return zeroed(rows, self.is_used).astype(kind) * weight[:, None]


def sliced_by_expert(rows: DeferredRows, outside: Mapping[Value, Named]) -> dict[Value, Named]:
    """Return what has a part for each expert, of all that deferred rows are made of."""
    dispatched = {v for n in rows.nodes if n.op.moves is RowMove.TO_SLOTS for v in n.operands}
    return {v: x for v, x in outside.items() if "expert" in x.axes and v not in dispatched}


def _leading(x: Named) -> Named:
    return x.to(("expert", *(a for a in x.axes if a != "expert")))


# The experts that are chosen, one after the other on all tokens: for a step of decoding.
#
# An expert that no token chose is skipped, and each other one is read once and in place: nothing
# is
# sorted, and no weight is gathered or sliced.  It costs the arithmetic of all tokens at each of
# these
# experts, which for a few tokens is less than to read the weights.


@dataclass(frozen=True)
class UsedExperts(Deferral):
    """A routing whose rows are made expert by expert, of those that are used."""

    def unpermute(self, rows: Operand | DeferredRows, gates: jax.Array | None) -> Named:
        """Return the sum over the experts that are used of their gated rows."""
        assert isinstance(rows, DeferredRows), "`permute` makes no rows"
        taken = rows.outside()
        of_experts = list(sliced_by_expert(rows, taken))
        shared = [v for v in taken if v not in of_experts]
        axes: tuple[str, ...] = ()

        def weighted(number: int, own: list[jax.Array], given: _Given) -> jax.Array:
            nonlocal axes
            made = {v: Named(a, taken[v].axes) for v, a in zip(shared, given.shared, strict=True)}
            made |= {v: Named(a, _rest(taken[v])) for v, a in zip(of_experts, own, strict=True)}
            layout = given.layout(self.routing, number)
            result = layout.unpermute(rows.make(made, layout), given.gates)
            axes = result.axes
            return result.array

        given = _Given(
            self.routing.experts,
            self.routing.assigned,
            [_experts_first(taken[v]) for v in of_experts],
            [taken[v].array for v in shared],
            gates,
        )
        array = _SumOfUsed(self.routing, weighted)(given)
        return Named(array, axes)

    def of_experts(self, first: jax.Array | int, count: int) -> UsedExperts:
        """Return `count` experts from `first` on, for all tokens."""
        return UsedExperts(self.routing.of_experts(first, count))


Stack = jax.Array | tuple[jax.Array, ...]
"""What each expert has: one array ``[expert, …]``, or an array for each."""


class _Given(NamedTuple):
    """All arrays that the sum is made of: a function with a gradient of its own closes over none.

    Attributes:
      experts: i32 ``[tokens, choice]``.
      assigned: which choices have a slot; None if all do.
      stacks: what has a part for each expert.
      shared: what all experts read.
      gates: ``[tokens, choice]``; None where rows have weights.
    """

    experts: jax.Array
    assigned: jax.Array | None
    stacks: list[Stack]
    shared: list[jax.Array]
    gates: jax.Array | None

    def layout(self, routing: Routing, number: int) -> OneExpert:
        """Return all tokens as rows of the expert `number`."""
        # Which slot it is makes no difference here, and costs a count over all tokens.
        slots = jnp.zeros_like(self.experts)
        routing = replace(
            routing, experts=self.experts, slots=slots, wanted=self.assigned, capacity=None
        )
        return OneExpert(routing, jnp.asarray(number, jnp.int32))

    def of(self, number: int) -> list[jax.Array]:
        """Return what the expert `number` has."""
        return [stack[number] for stack in self.stacks]


@dataclass(frozen=True)
class _SumOfUsed:
    """The sum over the experts that a token chose.

    Forward, weights are read where they are, within the branch of an expert.  The gradient of a
    branch has the shape of all that the branch reads, so where there is one, a branch is given the
    weights of its expert alone: else gradients of all experts would be added up for each of them.

    Attributes:
      routing: what was routed.
      weighted: makes the gated rows of an expert of what it has and what is given to all.
    """

    routing: Routing
    weighted: Callable[[int, list[jax.Array], _Given], jax.Array]

    def __call__(self, given: _Given) -> jax.Array:
        """Return the sum ``[tokens, …]``."""
        total = jax.custom_vjp(self._in_place)
        total.defvjp(
            lambda given: jax.vjp(self._sliced, given), lambda pull, cotangent: pull(cotangent)
        )
        return total(given)

    def _in_place(self, given: _Given) -> jax.Array:
        total = self._zeros(given)
        for number in range(self.routing.num_experts):
            total = jax.lax.cond(
                self._is_used(given, number),
                lambda sum, n=number: sum + self.weighted(n, given.of(n), given),
                lambda sum: sum,
                total,
            )
        return total

    def _sliced(self, given: _Given) -> jax.Array:
        total = self._zeros(given)
        for number in range(self.routing.num_experts):
            total = jax.lax.cond(
                self._is_used(given, number),
                lambda sum, own, n=number: sum + self.weighted(n, own, given),
                lambda sum, own: sum,
                total,
                given.of(number),
            )
        return total

    def _zeros(self, given: _Given) -> jax.Array:
        shape = jax.eval_shape(lambda: self.weighted(0, given.of(0), given))
        return zeros_like_on_devices(shape)

    def _is_used(self, given: _Given, number: int) -> jax.Array:
        return jnp.any(given.layout(self.routing, number).is_used)


def _rest(x: Named) -> tuple[str, ...]:
    return tuple(a for a in x.axes if a != "expert")


def _experts_first(x: Named) -> Stack:
    """Return what each expert has, in place where each has an array of its own."""
    return x.parts if isinstance(x, ExpertArrays) else x.to(("expert", *_rest(x))).array


# A row for each choice, in its order, with a copy of its expert's weights: for few tokens.


@dataclass(frozen=True)
class PerTokenWeights:
    """Rows in the order of the choices: nothing is sorted, and weights are gathered by row.

    Attributes:
      routing: what was routed.
      permutation: the map between choices and rows.
    """

    routing: Routing
    permutation: Permutation

    @classmethod
    def of(cls, routing: Routing) -> PerTokenWeights:
        """Leave each choice of `routing` where it is."""
        row = jnp.arange(routing.num_choices, dtype=jnp.int32)
        if routing.assigned is not None:
            row = jnp.where(routing.assigned.reshape(-1), row, -1)
        return cls(routing, Permutation(row, row.reshape(routing.experts.shape)))

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
        """The expert of each row; the first where the row has none."""
        experts = self.routing.experts.reshape(-1)
        return experts if self.is_full else jnp.where(self.is_used, experts, 0)

    @property
    def row_groups(self) -> jax.Array:
        """The group of the token of each row; the first where the row has none."""
        return self.routing.row_groups(self.permutation.token_of_row)

    def by_expert(self, values: jax.Array) -> jax.Array:
        """Gather what the expert of each row has."""
        picked = jnp.take(values, self.row_experts, axis=0, mode="clip")
        return picked if self.is_full else with_masked_gradient(picked, self.is_used)

    def permute(self, x: Named) -> Rows:
        """Repeat each token for its choices."""
        return tokens_to_rows(self, x, lambda tokens: permute(tokens, self.permutation))

    def permute_gates(self, gates: jax.Array) -> Rows:
        """Gather the gates of rows from those of choices."""
        return Rows(permute_choices(gates, self.permutation), (), self)

    def unpermute(self, rows: Operand | DeferredRows, gates: jax.Array | None) -> Named:
        """Sum the rows of each token, forward and backward by gathers."""
        assert isinstance(rows, Rows), "`permute` made rows"
        return rows_to_tokens(
            self.routing, rows, lambda flat: sum_rows(flat, self.permutation, gates)
        )

    def of_experts(self, first: jax.Array | int, count: int) -> PerTokenWeights:
        """Return the rows of `count` experts from `first` on; the others stay, unused."""
        return PerTokenWeights.of(self.routing.of_experts(first, count))

    def matmul(self, x: Rows, weight: Named, over: tuple[str, ...], kind: DTypeLike) -> Rows:
        """Multiply each row with a copy of its expert's weights."""
        return gathered_matmul(x, weight, over)
