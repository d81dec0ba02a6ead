"""Where the rows that experts work on lie: what every dispatch lowering has to say of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from math import prod

import jax
import jax.numpy as jnp

from moecc_backends.xla.dispatch.gather_vjp import combine, dispatch
from moecc_backends.xla.dispatch.permutation import Placement


@dataclass(frozen=True)
class Routing:
    """Which experts the tokens go to, before it is settled how rows lie.

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

    experts: jax.Array
    slots: jax.Array
    wanted: jax.Array | None
    num_experts: int
    groups: int
    capacity: int | None
    tokens: tuple[str, ...]
    token_sizes: tuple[int, ...]

    @property
    def placed(self) -> jax.Array | None:
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

    def of_experts(self, first: jax.Array | int, count: int) -> Routing:
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

    def group_of(self, token: jax.Array) -> jax.Array:
        """Return the group of each token; groups are equal runs of tokens."""
        return token // max(self.num_tokens // max(self.groups, 1), 1)


@dataclass(frozen=True)
class Packing(ABC):
    """Where the rows of a routing lie, and how tokens get there and back.

    Attributes:
      routing: what was routed.
    """

    routing: Routing

    @property
    @abstractmethod
    def is_used(self) -> jax.Array:
        """Whether something was placed in each row: bool ``[rows]``."""

    @property
    def is_full(self) -> bool:
        """Whether it is certain that something was placed in every row."""
        return False

    @abstractmethod
    def dispatch(self, tokens: jax.Array) -> jax.Array:
        """Copy ``[tokens, width]`` into ``[rows, width]``; rows without a token may be anything."""

    @abstractmethod
    def combine(self, rows: jax.Array, gates: jax.Array) -> jax.Array:
        """Sum the rows ``[rows, width]`` of each token, weighted with `gates` ``[tokens, choice]``.

        The sum runs in float32 at least.  Rows without a token are never read.
        """


@dataclass(frozen=True)
class SlotPacking(Packing):
    """Rows ``[expert, group, slot]``: as many slots for each expert, empty ones zero."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """The sizes of expert, group and slot."""
        assert self.routing.capacity is not None, "slots need a capacity"
        return self.routing.num_experts, self.routing.groups, self.routing.capacity


@dataclass(frozen=True)
class RowPacking(Packing):
    """Rows without axes of experts and groups: each stands by itself."""

    @property
    @abstractmethod
    def row_tokens(self) -> jax.Array:
        """The token of each row, i32 ``[rows]``; any number where the row has none."""

    @abstractmethod
    def by_expert(self, values: jax.Array) -> jax.Array:
        """Pick for each row what its expert has of ``[experts, …]``: ``[rows, …]``."""

    @property
    @abstractmethod
    def row_experts(self) -> jax.Array:
        """The expert of each row; one of them all where the row has none."""

    @property
    def row_groups(self) -> jax.Array:
        """The group of the token of each row; the first where the row has none."""
        group = self.routing.group_of(self.row_tokens)
        return jnp.clip(group, 0, max(self.routing.groups - 1, 0))


@dataclass(frozen=True)
class PlacedRows(RowPacking):
    """Rows that a placement maps to choices.

    Attributes:
      placement: the map between choices and rows.
    """

    placement: Placement

    @property
    def is_used(self) -> jax.Array:
        """Whether something was placed in each row: bool ``[rows]``."""
        return self.placement.choice_of_row >= 0

    @property
    def is_full(self) -> bool:
        """Whether it is certain that something was placed in every row."""
        return self.routing.placed is None

    @property
    def row_tokens(self) -> jax.Array:
        """The token of each row, i32 ``[rows]``; negative where the row has none."""
        return self.placement.choice_of_row // self.routing.experts.shape[1]

    def dispatch(self, tokens: jax.Array) -> jax.Array:
        """Gather rows from tokens, forward and backward."""
        return dispatch(tokens, self.placement)

    def combine(self, rows: jax.Array, gates: jax.Array) -> jax.Array:
        """Gather the rows of each token, forward and backward."""
        return combine(rows, self.placement, gates)
