"""All experts on all tokens, one expert after the other, and the gates pick.

It costs as many times the arithmetic as there are experts for each choice, and moves no row: the
oracle of the other strategies.  What stands between dispatch and combine is deferred until the
combine, which repeats it for each expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moecc.ir.graph import Value
from moecc.ir.traits import RowMove
from moecc_backends.xla.dispatch.deferral import Deferral
from moecc_backends.xla.dispatch.flat import gathered_matmul, rows_to_tokens, tokens_to_rows
from moecc_backends.xla.trace.device_view import zeros_like_on_devices
from moecc_backends.xla.trace.dtypes import accumulator
from moecc_backends.xla.trace.padding_rows import with_masked_gradient, zeroed
from moecc_backends.xla.trace.routing import Routing
from moecc_backends.xla.trace.values import DeferredRows, Named, Operand, Rows


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
