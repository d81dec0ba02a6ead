"""The training step of a graph: gradients, and the update of its parameters by optax.

Parameters and the state of the optimiser are float32; the model computes in the type that is asked
for, its router in float32 (selective precision, ST-MoE §3.3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moecc_backends.xla.train.loss import Loss, Model, Tree, loss_function

State = tuple[Tree, Any]
"""Parameters by name, and the state of the optimiser."""

Step = Callable[[State, Tree], tuple[State, dict[str, jax.Array]]]

Gradients = Callable[[Tree, Tree], tuple[Tree, dict[str, jax.Array]]]
"""``(params, inputs) → (gradients, metrics)``."""


def gradient_function(loss: Loss) -> Gradients:
    """Return ``(params, inputs) → (gradients, metrics)`` of one batch."""
    return jax.grad(loss, has_aux=True)


def apply_update(update: Any, state: State, gradients: Tree) -> State:
    """Return parameters and optimiser state after one update.

    Args:
      update: what `optimizer` returns.
      state: the parameters, and the state of the optimiser.
      gradients: by name, as the parameters.
    """
    params, moments = state
    changes, moments = update.update(gradients, moments, params)
    return jax.tree.map(jnp.add, params, changes), moments


def train_step(model: Model, update: Any) -> Step:
    """Return the step ``(state, inputs) → (state, metrics)`` of `model` under an optimiser.

    Args:
      model: the model with its losses, see `loss_function`.
      update: what `optimizer` returns.
    """
    gradients_of = gradient_function(loss_function(model))

    def step(state: State, inputs: Tree) -> tuple[State, dict[str, jax.Array]]:
        gradients, metrics = gradients_of(state[0], inputs)
        return apply_update(update, state, gradients), metrics

    return step
