"""Slots under a capacity, reached by index."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Self

from jax import Array

from moecc_backends.xla.dispatch.flat import (
    RowPermutation,
    capacity_permutation,
    slots_to_tokens,
    tokens_to_slots,
)
from moecc_backends.xla.dispatch.sorted_rows import permute, permute_choices, sum_rows
from moecc_backends.xla.trace.arrays import poisoned_values, with_poisoned_gradient
from moecc_backends.xla.trace.routing import Routing
from moecc_backends.xla.trace.values import SLOT_AXES, DeferredRows, Named, Operand


@dataclass(frozen=True)
class CapacitySlots:
    """Slots filled from an index of each, and read by one; gradients gather as well.

    Attributes:
      routing: the experts and slots of each token.
      poison: put NaN into empty slots, in values and cotangents, to see that nothing reads them.
    """

    routing: Routing
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
        slots = tokens_to_slots(self.routing, x, lambda tokens: permute(tokens, self.permutation))
        return self._poisoned(slots, with_poisoned_gradient)

    def permute_gates(self, gates: Array) -> Named:
        """Gather the gates of slots from those of choices."""
        slots = permute_choices(gates, self.permutation).reshape(self.routing.slot_shape)
        return self._poisoned(Named(slots, SLOT_AXES), with_poisoned_gradient)

    def unpermute(self, rows: Operand | DeferredRows, gates: Array | None) -> Named:
        """Gather the slots of each token."""
        assert isinstance(rows, Named), "slots have axes"
        return slots_to_tokens(
            self.routing,
            self._poisoned(rows, poisoned_values),
            lambda slots: sum_rows(slots, self.permutation, gates),
        )

    def of_experts(self, first: Array | int, count: int) -> Self:
        """Return the slots of `count` experts from `first` on."""
        return replace(self, routing=self.routing.of_experts(first, count))

    def _poisoned(self, slots: Named, poison: Callable[[Array, Array], Array]) -> Named:
        if not self.poison:
            return slots
        slots = slots.to((*SLOT_AXES, *(a for a in slots.axes if a not in SLOT_AXES)))
        shape, is_used = slots.array.shape, self.permutation.choice_of_row >= 0
        flat = poison(slots.array.reshape(prod(shape[:3]), *shape[3:]), is_used)
        return Named(flat.reshape(shape), slots.axes)
