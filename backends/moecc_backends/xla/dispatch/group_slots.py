"""Slots that are filled group by group, for XLA's partitioner (GSPMD).

No device looks at another's tokens, and slots are held first to their groups and then to their
experts: from these two constraints the partitioner makes one all-to-all (GShard, §3.2), from one of
them all-gathers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Protocol

import jax

from moecc_backends.xla.dispatch.gather_vjp import permute, permute_choices, sum_rows
from moecc_backends.xla.dispatch.permutation import Permutation, capacity_permutation
from moecc_backends.xla.trace.routing import Routing
from moecc_backends.xla.trace.values import SLOT_AXES, DeferredRows, Named, Operand

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
