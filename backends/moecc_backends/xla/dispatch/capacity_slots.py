"""Slots under a capacity, reached by index (gather) or by one-hot products (einsum)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp

from moecc_backends.xla.dispatch.gather_vjp import combine, dispatch
from moecc_backends.xla.dispatch.layout import SlotPacking
from moecc_backends.xla.dispatch.permutation import Placement, capacity_placement
from moecc_backends.xla.trace.dtypes import accumulator
from moecc_backends.xla.trace.padding_rows import with_masked_gradient, zeroed


@dataclass(frozen=True)
class GatheredSlots(SlotPacking):
    """Slots filled from an index of each, and read by one; gradients gather as well."""

    @cached_property
    def placement(self) -> Placement:
        """The map between choices and slots, experts first, as a batched product takes them."""
        routing = self.routing
        experts, groups, limit = self.shape
        return capacity_placement(
            routing.experts, routing.slots, experts, limit, groups, expert_major=True
        )

    @property
    def is_used(self) -> jax.Array:
        """Whether something was placed in each slot: bool ``[rows]``."""
        return self.placement.choice_of_row >= 0

    def dispatch(self, tokens: jax.Array) -> jax.Array:
        """Gather slots from tokens."""
        return dispatch(tokens, self.placement)

    def combine(self, rows: jax.Array, gates: jax.Array) -> jax.Array:
        """Gather the slots of each token."""
        return combine(rows, self.placement, gates)


@dataclass(frozen=True)
class OneHotSlots(SlotPacking):
    """Slots filled and read by products with one-hot masks (GShard, Lepikhin et al. 2020).

    The masks have ``tokens · experts · capacity`` elements, and each product costs as many
    multiplications for every element of a token.
    """

    @cached_property
    def _expert_hot(self) -> jax.Array:
        """1 at the expert of each choice that has a slot: ``[group, token, choice, expert]``."""
        routing = self.routing
        experts = jnp.where(routing.slots >= 0, routing.experts, -1)
        return jax.nn.one_hot(self._in_groups(experts), routing.num_experts, dtype=bool)

    @cached_property
    def _slot_hot(self) -> jax.Array:
        """1 at the slot of each choice that has one: ``[group, token, choice, slot]``."""
        return jax.nn.one_hot(self._in_groups(self.routing.slots), self.shape[2], dtype=bool)

    @cached_property
    def is_used(self) -> jax.Array:
        """Whether something was placed in each slot: bool ``[rows]``."""
        return jnp.any(self._mask(None, jnp.float32) > 0, axis=1).swapaxes(0, 1).reshape(-1)

    def dispatch(self, tokens: jax.Array) -> jax.Array:
        """Multiply tokens with the mask of who lies where."""
        experts, groups, limit = self.shape
        mask = self._mask(None, tokens.dtype)
        rows = jnp.einsum(
            "gtes,gtd->egsd",
            mask,
            self._in_groups(tokens),
            preferred_element_type=accumulator(tokens.dtype),
        )
        rows = rows.astype(tokens.dtype).reshape(experts * groups * limit, -1)
        return with_masked_gradient(rows, self.is_used)

    def combine(self, rows: jax.Array, gates: jax.Array) -> jax.Array:
        """Multiply slots with the mask of who lies where, times the gates."""
        kind = accumulator(rows.dtype)
        mask = self._mask(self._in_groups(gates).astype(kind), kind)
        slots = zeroed(rows, self.is_used).astype(kind).reshape(*self.shape, rows.shape[-1])
        result = jnp.einsum("gtes,egsd->gtd", mask, slots, preferred_element_type=kind)
        return result.reshape(-1, rows.shape[-1]).astype(rows.dtype)

    def _mask(self, gates: jax.Array | None, kind: jax.typing.DTypeLike) -> jax.Array:
        """Return the sum over choices of their masks, ``[group, token, expert, slot]``."""
        experts = self._expert_hot.astype(kind)
        weighted = experts if gates is None else experts * gates[..., None]
        return jnp.einsum("gtke,gtks->gtes", weighted, self._slot_hot.astype(kind))

    def _in_groups(self, values: jax.Array) -> jax.Array:
        groups = self.shape[1]
        return values.reshape(groups, values.shape[0] // max(groups, 1), *values.shape[1:])
