"""The guard of a step: what is not finite, or a spike of the loss, is not learned from.

It is part of the compiled program, so that a bad step costs nothing but its time.  When to go back
to a checkpoint is the loop's to decide.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from moecc.train.recipe import GuardSection

GuardState = dict[str, jax.Array]
"""``losses``: those of the last steps that were taken; ``taken``, ``skipped``, ``in_a_row``."""


@dataclass(frozen=True)
class Guard:
    """Decides whether a step is taken.

    Attributes:
      section: how far a loss may be above the mean of how many before it.
    """

    section: GuardSection

    def init(self) -> GuardState:
        """Return the state before the first step."""
        zero = jnp.zeros((), jnp.int32)
        losses = jnp.zeros((self.section.window,), jnp.float32)
        return {"losses": losses, "taken": zero, "skipped": zero, "in_a_row": zero}

    def __call__(
        self, state: GuardState, loss: jax.Array, norm: jax.Array
    ) -> tuple[jax.Array, GuardState, dict[str, jax.Array]]:
        """Return whether the step is taken, the state after it, and metrics.

        ``guard.limit`` is the largest loss that is taken, infinite until the window is full.

        Args:
          state: the state before it.
          loss: of the batch.
          norm: of its gradients.
        """
        is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        limit = self._limit(state)
        is_spike = loss.astype(jnp.float32) > limit
        ok = is_finite & ~is_spike
        at = state["taken"] % self.section.window
        losses = state["losses"].at[at].set(loss.astype(jnp.float32))
        after = {
            "losses": jnp.where(ok, losses, state["losses"]),
            "taken": state["taken"] + ok,
            "skipped": state["skipped"] + ~ok,
            "in_a_row": jnp.where(ok, 0, state["in_a_row"] + 1),
        }
        told = {
            "guard.skipped": ~ok, "guard.spike": is_spike, "guard.limit": limit,
            "guard.in_a_row": after["in_a_row"],
        }  # fmt: skip
        return ok, after, told

    def _limit(self, state: GuardState) -> jax.Array:
        """Return the loss above which a loss is far above those of the window."""
        unbounded = jnp.asarray(jnp.inf, jnp.float32)
        if not self.section.sigma:
            return unbounded
        losses = state["losses"]
        mean = jnp.mean(losses)
        # A deviation of nothing but rounding would make a spike of any loss.
        std = jnp.maximum(jnp.std(losses), 1e-4 * jnp.abs(mean))
        is_full = state["taken"] >= self.section.window
        return jnp.where(is_full, mean + self.section.sigma * std, unbounded)
