"""Slots under a capacity, reached by index (gather) or by one-hot products (einsum)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Protocol

import jax
import jax.numpy as jnp

from moecc_backends.xla.dispatch.flat import (
    Permutation,
    capacity_permutation,
    slots_to_tokens,
    tokens_to_slots,
)
from moecc_backends.xla.dispatch.sorted_rows import permute, permute_choices, sum_rows
from moecc_backends.xla.trace.arrays import (
    poisoned_values,
    with_masked_gradient,
    with_poisoned_gradient,
    zeroed,
)
from moecc_backends.xla.trace.routing import Routing
from moecc_backends.xla.trace.values import (
    SLOT_AXES,
    DeferredRows,
    Named,
    Operand,
    SlotLayout,
    accumulator,
)

_Poison = Callable[[jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class CapacitySlots:
    """Slots filled from an index of each, and read by one; gradients gather as well."""

    routing: Routing

    @cached_property
    def permutation(self) -> Permutation:
        """The map between choices and slots, experts first, as a batched product takes them."""
        routing = self.routing
        experts, groups, limit = routing.slot_shape
        return capacity_permutation(
            routing.experts, routing.slots, experts, limit, groups, expert_major=True
        )

    @property
    def is_used(self) -> jax.Array:
        """Whether each slot has a token: bool ``[expert * group * slot]``."""
        return self.permutation.choice_of_row >= 0

    def permute(self, x: Named) -> Named:
        """Gather slots from tokens."""
        return tokens_to_slots(self.routing, x, lambda tokens: permute(tokens, self.permutation))

    def permute_gates(self, gates: jax.Array) -> Named:
        """Gather the gates of slots from those of choices."""
        made = permute_choices(gates, self.permutation)
        return Named(made.reshape(self.routing.slot_shape), SLOT_AXES)

    def unpermute(self, rows: Operand | DeferredRows, gates: jax.Array | None) -> Named:
        """Gather the slots of each token."""
        assert isinstance(rows, Named), "slots have axes"
        return slots_to_tokens(
            self.routing, rows, lambda slots: sum_rows(slots, self.permutation, gates)
        )

    def of_experts(self, first: jax.Array | int, count: int) -> CapacitySlots:
        """Return the slots of `count` experts from `first` on."""
        return CapacitySlots(self.routing.of_experts(first, count))


@dataclass(frozen=True)
class OneHotSlots:
    """Slots filled and read by products with one-hot masks (GShard, Lepikhin et al. 2020).

    The masks have ``tokens · experts · capacity`` elements, and each product costs as many
    multiplications for every element of a token.
    """

    routing: Routing

    @cached_property
    def _expert_hot(self) -> jax.Array:
        """1 at the expert of each choice that has a slot: ``[group, token, choice, expert]``."""
        routing = self.routing
        experts = jnp.where(routing.slots >= 0, routing.experts, -1)
        return jax.nn.one_hot(self._in_groups(experts), routing.num_experts, dtype=bool)

    @cached_property
    def _slot_hot(self) -> jax.Array:
        """1 at the slot of each choice that has one: ``[group, token, choice, slot]``."""
        limit = self.routing.slot_shape[2]
        return jax.nn.one_hot(self._in_groups(self.routing.slots), limit, dtype=bool)

    @cached_property
    def is_used(self) -> jax.Array:
        """Whether each slot has a token: bool ``[expert * group * slot]``."""
        return jnp.any(self._mask(None, jnp.float32) > 0, axis=1).swapaxes(0, 1).reshape(-1)

    def permute(self, x: Named) -> Named:
        """Multiply tokens with the mask of who has which slot."""
        return tokens_to_slots(self.routing, x, self._filled)

    def permute_gates(self, gates: jax.Array) -> Named:
        """Multiply gates with the mask of who has which slot."""
        made = jnp.einsum(
            "gtke,gtks,gtk->egs",
            *(hot.astype(gates.dtype) for hot in (self._expert_hot, self._slot_hot)),
            self._in_groups(gates),
        )
        return Named(made, SLOT_AXES)

    def unpermute(self, rows: Operand | DeferredRows, gates: jax.Array | None) -> Named:
        """Multiply slots with the mask of who has which slot, times the gates."""
        assert isinstance(rows, Named), "slots have axes"
        return slots_to_tokens(self.routing, rows, lambda slots: self._read(slots, gates))

    def of_experts(self, first: jax.Array | int, count: int) -> OneHotSlots:
        """Return the slots of `count` experts from `first` on."""
        return OneHotSlots(self.routing.of_experts(first, count))

    def _filled(self, tokens: jax.Array) -> jax.Array:
        mask = self._mask(None, tokens.dtype)
        rows = jnp.einsum(
            "gtes,gtd->egsd",
            mask,
            self._in_groups(tokens),
            preferred_element_type=accumulator(tokens.dtype),
        )
        rows = rows.astype(tokens.dtype).reshape(-1, tokens.shape[1])
        return with_masked_gradient(rows, self.is_used)

    def _read(self, rows: jax.Array, gates: jax.Array | None) -> jax.Array:
        kind, shape = accumulator(rows.dtype), self.routing.slot_shape
        mask = self._mask(None if gates is None else self._in_groups(gates).astype(kind), kind)
        slots = zeroed(rows, self.is_used).astype(kind).reshape(*shape, rows.shape[-1])
        result = jnp.einsum("gtes,egsd->gtd", mask, slots, preferred_element_type=kind)
        return result.reshape(-1, rows.shape[-1]).astype(rows.dtype)

    def _mask(self, gates: jax.Array | None, kind: jax.typing.DTypeLike) -> jax.Array:
        """Return the sum over choices of their masks, ``[group, token, expert, slot]``."""
        experts = self._expert_hot.astype(kind)
        weighted = experts if gates is None else experts * gates[..., None]
        return jnp.einsum("gtke,gtks->gtes", weighted, self._slot_hot.astype(kind))

    def _in_groups(self, values: jax.Array) -> jax.Array:
        groups = self.routing.groups
        return values.reshape(groups, values.shape[0] // max(groups, 1), *values.shape[1:])


@dataclass(frozen=True)
class PoisonedSlots:
    """Slots with NaN in the empty ones, in values and cotangents, to see that nothing reads them.

    Attributes:
      layout: fills the slots.
    """

    layout: SlotLayout

    @property
    def routing(self) -> Routing:
        """What was routed."""
        return self.layout.routing

    @property
    def is_used(self) -> jax.Array:
        """Whether each slot has a token: bool ``[expert * group * slot]``."""
        return self.layout.is_used

    def permute(self, x: Named) -> Named:
        """Fill the slots; cotangents of empty ones become NaN.

        Their values are zeros that an operation may read: a sum over slots, say.
        """
        slots = self.layout.permute(x)
        assert isinstance(slots, Named), "slots have axes"
        return self._flat(slots, with_poisoned_gradient)

    def permute_gates(self, gates: jax.Array) -> Named:
        """Fill the slots with gates; cotangents of empty ones become NaN."""
        made = self.layout.permute_gates(gates)
        assert isinstance(made, Named), "slots have axes"
        return self._flat(made, with_poisoned_gradient)

    def unpermute(self, rows: Operand | DeferredRows, gates: jax.Array | None) -> Named:
        """Read the slots, the empty ones filled with NaN."""
        assert isinstance(rows, Named), "slots have axes"
        return self.layout.unpermute(self._flat(rows, poisoned_values), gates)

    def of_experts(self, first: jax.Array | int, count: int) -> PoisonedSlots:
        """Return the slots of `count` experts from `first` on."""
        own = self.layout.of_experts(first, count)
        return PoisonedSlots(own)

    def _flat(self, slots: Named, function: _Poison) -> Named:
        made = slots.to((*SLOT_AXES, *(a for a in slots.axes if a not in SLOT_AXES)))
        shape = made.array.shape
        flat = function(made.array.reshape(prod(shape[:3]), *shape[3:]), self.is_used)
        return Named(flat.reshape(shape), made.axes)


# Slots that are filled group by group, for XLA's partitioner (GSPMD).
#
# No device looks at another's tokens, and slots are held first to their groups and then to their
# experts: from these two constraints the partitioner makes one all-to-all (GShard, §3.2), from
# one of
# them all-gathers.

_GROUP_MAJOR = ("group", "expert", "slot")


class GroupShards(Protocol):
    """Where groups and experts are sharded."""

    def grouped(self, array: jax.Array, groups: int) -> jax.Array:
        """Return ``[tokens, …]`` as ``[group, token, …]``, each group where its tokens are."""
        ...

    def with_groups(self, array: jax.Array) -> jax.Array:
        """Return ``[group, …]`` with each group where its tokens are."""
        ...

    def at_groups(self, slots: Named) -> Named:
        """Return slots where the tokens of their groups are."""
        ...

    def at_experts(self, slots: Named) -> Named:
        """Return slots where their experts are."""
        ...


@dataclass(frozen=True)
class GroupSlots:
    """Slots of each group apart.

    Attributes:
      routing: what was routed, under a capacity.
      shards: where groups and experts are sharded.
    """

    routing: Routing
    shards: GroupShards

    @cached_property
    def permutations(self) -> Permutation:
        """Choices and rows ``[expert * slot]`` of each group, with the groups as axis in front."""
        experts, groups, limit = self.routing.slot_shape

        def of_group(chosen: jax.Array, slots: jax.Array) -> Permutation:
            return capacity_permutation(chosen, slots, experts, limit)

        chosen, slots = (
            self.shards.grouped(a, groups) for a in (self.routing.experts, self.routing.slots)
        )
        made: Permutation = jax.vmap(of_group)(chosen, slots)
        return made

    def permute(self, x: Named) -> Named:
        """Gather the slots of each group from its tokens, and exchange them for the experts'."""
        routing = self.routing
        experts, groups, limit = routing.slot_shape
        rest = tuple(a for a in x.axes if a not in routing.tokens)
        source = x.to((*routing.tokens, *rest)).array
        inner = source.shape[len(routing.tokens) :]
        tokens = self.shards.grouped(source.reshape(routing.num_tokens, prod(inner)), groups)
        rows = self.shards.with_groups(jax.vmap(permute)(tokens, self.permutations))
        slots = Named(rows.reshape(groups, experts, limit, *inner), (*_GROUP_MAJOR, *rest))
        exchanged = self.shards.at_experts(self.shards.at_groups(slots))
        return exchanged.to((*SLOT_AXES, *rest))

    def permute_gates(self, gates: jax.Array) -> Named:
        """Gather the gates of the slots of each group, and exchange them for the experts'."""
        experts, groups, limit = self.routing.slot_shape
        given = self.shards.grouped(gates, groups)
        made = self.shards.with_groups(jax.vmap(permute_choices)(given, self.permutations))
        slots = Named(made.reshape(groups, experts, limit), _GROUP_MAJOR)
        return self.shards.at_experts(self.shards.at_groups(slots)).to(SLOT_AXES)

    def unpermute(self, rows: Operand | DeferredRows, gates: jax.Array | None) -> Named:
        """Exchange the slots for those of the groups, and gather the slots of each token."""
        assert isinstance(rows, Named), "slots have axes"
        routing, groups = self.routing, self.routing.groups
        rest = tuple(a for a in rows.axes if a not in SLOT_AXES)
        slots = rows.to((*_GROUP_MAJOR, *rest))
        back = self.shards.at_groups(self.shards.at_experts(slots)).array
        inner = back.shape[3:]
        flat = back.reshape(groups, prod(back.shape[1:3]), prod(inner))
        weights = None if gates is None else self.shards.grouped(gates, groups)
        made = self.shards.with_groups(jax.vmap(sum_rows)(flat, self.permutations, weights))
        return Named(made.reshape(*routing.token_sizes, *inner), (*routing.tokens, *rest))

    def of_experts(self, first: jax.Array | int, count: int) -> GroupSlots:
        """Return the slots of `count` experts from `first` on."""
        return GroupSlots(self.routing.of_experts(first, count), self.shards)
