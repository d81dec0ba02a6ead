"""The experts that are chosen, one after the other on all tokens: for a step of decoding.

An expert that no token chose is skipped, and each other one is read once and in place: nothing is
sorted, and no weight is gathered or sliced.  It costs the arithmetic of all tokens at each of these
experts, which for a few tokens is less than to read the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moecc_backends.xla.dispatch.all_experts import OneExpert, sliced_by_expert
from moecc_backends.xla.dispatch.deferral import Deferral
from moecc_backends.xla.trace.device_view import zeros_like_on_devices
from moecc_backends.xla.trace.routing import Routing
from moecc_backends.xla.trace.values import DeferredRows, ExpertArrays, Named, Operand


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
