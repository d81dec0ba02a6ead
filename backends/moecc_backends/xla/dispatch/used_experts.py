"""The experts that are chosen, one after the other on all tokens: for a step of decoding.

An expert that no token chose is skipped, and each other one is read once and in place: nothing is
sorted, and no weight is gathered or sliced.  It costs the arithmetic of all tokens at each of these
experts, which for a few tokens is less than to read the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from moecc_backends.xla.dispatch.all_experts import OneExpert, sliced_by_expert
from moecc_backends.xla.trace.device_view import zeros_like_on_devices
from moecc_backends.xla.trace.routing import Routing
from moecc_backends.xla.trace.values import Deferred, DeferredRows, ExpertArrays, Named, Operand


@dataclass(frozen=True)
class UsedExperts:
    """A routing whose rows are made expert by expert, of those that are used."""

    routing: Routing

    def permute(self, x: Named) -> Deferred:
        """Make nothing: rows come expert by expert, when they are combined."""
        return Deferred(self.routing)

    def unpermute(self, rows: Operand | DeferredRows, gates: jax.Array) -> Named:
        """Return the sum over the experts that are used of their gated rows."""
        assert isinstance(rows, DeferredRows), "`permute` makes no rows"
        outside = rows.outside()
        sliced = sliced_by_expert(rows, outside)
        axes: tuple[str, ...] = ()

        def weighted(number: int) -> jax.Array:
            nonlocal axes
            own = {v: _of_expert(x, number) for v, x in sliced.items()}
            layout = OneExpert(self.routing, jnp.asarray(number, jnp.int32))
            made = layout.unpermute(rows.make({**outside, **own}, layout), gates)
            axes = made.axes
            return made.array

        shape = jax.eval_shape(lambda: weighted(0))
        total = zeros_like_on_devices(shape)
        for number in range(self.routing.num_experts):
            is_used = jnp.any(OneExpert(self.routing, jnp.asarray(number, jnp.int32)).is_used)
            total = jax.lax.cond(
                is_used, lambda sum, n=number: sum + weighted(n), lambda sum: sum, total
            )
        return Named(total, axes)

    def of_experts(self, first: jax.Array | int, count: int) -> UsedExperts:
        """Return `count` experts from `first` on, for all tokens."""
        return UsedExperts(self.routing.of_experts(first, count))


def _of_expert(x: Named, number: int) -> Named:
    """Return what expert `number` has of `x`, in place where each has an array of its own."""
    if isinstance(x, ExpertArrays):
        return Named(x.parts[number], x.axes[1:])
    leading = x.to(("expert", *(a for a in x.axes if a != "expert")))
    return Named(leading.array[number], leading.axes[1:])
