"""Which experts the tokens go to: what the lowering of a routing gives to a dispatch strategy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import jax.numpy as jnp
from jax import Array


@dataclass(frozen=True)
class Routing:
    """Which experts the tokens go to, before a strategy lays out rows.

    Attributes:
      experts: i32 ``[tokens, choice]``.
      slots: i32 ``[tokens, choice]``, within group and expert; −1 where a choice was dropped.
      wanted: bool ``[tokens, choice]``, which choices ask for a slot; None if all do.
      num_experts: the number of experts.
      groups: the number of token groups.
      capacity: the slots of an expert in a group, or None where all that ask get one.
      tokens: the token axes, outermost first.
      token_sizes: their sizes.
    """

    experts: Array
    slots: Array
    wanted: Array | None
    num_experts: int
    groups: int
    capacity: int | None
    tokens: tuple[str, ...]
    token_sizes: tuple[int, ...]

    @property
    def assigned(self) -> Array | None:
        """Which choices have a slot, ``[tokens, choice]``; None if all do."""
        return self.wanted if self.capacity is None else self.slots >= 0

    @property
    def num_tokens(self) -> int:
        """The number of tokens."""
        return prod(self.token_sizes)

    @property
    def num_choices(self) -> int:
        """The choices of all tokens."""
        return int(self.experts.size)

    @property
    def num_slots(self) -> int | None:
        """The slots of all experts and groups; None without a capacity."""
        return None if self.capacity is None else self.num_experts * self.groups * self.capacity

    @property
    def slot_shape(self) -> tuple[int, int, int]:
        """The sizes of expert, group and slot under a capacity."""
        assert self.capacity is not None, "slots need a capacity"
        return self.num_experts, self.groups, self.capacity

    def of_experts(self, first: Array | int, count: int) -> Routing:
        """Return the routing to `count` experts from `first` on; other choices have no slot."""
        experts = self.experts - first
        is_own = (experts >= 0) & (experts < count)
        wanted = is_own if self.wanted is None else self.wanted & is_own
        return replace(
            self,
            experts=jnp.where(is_own, experts, 0),
            slots=jnp.where(is_own, self.slots, -1),
            wanted=wanted,
            num_experts=count,
        )

    def group_of(self, token: Array) -> Array:
        """Return the group of each token; groups are equal runs of tokens."""
        return token // max(self.num_tokens // max(self.groups, 1), 1)

    def row_groups(self, row_tokens: Array) -> Array:
        """Return the group of the token of each row; any group where the row has no token."""
        return jnp.clip(self.group_of(row_tokens), 0, max(self.groups - 1, 0))
