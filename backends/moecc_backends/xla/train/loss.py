"""The loss of a training step: cross entropy of the next tokens, and the losses of routers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moecc.errors import InputError
from moecc.ir.graph import Graph

LOGITS = "logits"
AUXILIARY = "loss.auxiliary"
"""The output that `add-losses` makes of all the losses of routers."""

TARGETS = "targets"
"""The input of a step besides those of the graph: the next tokens, ``[batch, seq]``."""

IGNORED = -1
"""The target of a token that does not take part in the loss: padding."""

Tree = Mapping[str, Any]

Model = Callable[[Tree, Tree], dict[str, jax.Array]]
"""A graph as ``(params, inputs) → outputs``: on one device, or on a mesh."""

Loss = Callable[[Tree, Tree], tuple[jax.Array, dict[str, jax.Array]]]
"""``(params, inputs) → (loss, metrics)``."""


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the mean over tokens of −log softmax(logits)[target], in float32 at least.

    No entry is picked by index, because the vocabulary may be sharded.

    Args:
      logits: ``[…, vocab]``.
      targets: ``[…]``; those that are `IGNORED` do not count.
    """
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    top = jax.lax.stop_gradient(jnp.max(wide, axis=-1, keepdims=True))
    total = jnp.log(jnp.sum(jnp.exp(wide - top), axis=-1)) + top[..., 0]
    entry = jax.lax.broadcasted_iota(targets.dtype, wide.shape, wide.ndim - 1)
    picked = jnp.sum(jnp.where(entry == targets[..., None], wide, 0), axis=-1)
    counts = (targets != IGNORED).astype(wide.dtype)
    return jnp.sum((total - picked) * counts) / jnp.maximum(jnp.sum(counts), 1)


def check_trainable(graph: Graph) -> None:
    """Raise InputError if `graph` has no logits to train."""
    if LOGITS not in graph.output_names:
        raise InputError(
            "a training step needs logits",
            where=graph.name,
            expected=f"an output called {LOGITS}",
            found=", ".join(graph.output_names),
        )


def loss_function(model: Model) -> Loss:
    """Return ``(params, inputs) → (loss, metrics)`` of `model`.

    The loss is the cross entropy of the logits, and the losses of the routers if the graph has
    them (``add-losses``).  `inputs` has `TARGETS` besides the inputs of the graph.

    Args:
      model: what `moecc_backends.xla.lower.function.function` or
        `moecc_backends.xla.lower.shard_map.sharded_function` makes of a graph with logits.
    """

    def loss(params: Tree, inputs: Tree) -> tuple[jax.Array, dict[str, jax.Array]]:
        outputs = model(params, {n: a for n, a in inputs.items() if n != TARGETS})
        entropy = cross_entropy(outputs.pop(LOGITS), inputs[TARGETS])
        total = entropy + outputs.get(AUXILIARY, 0.0)
        return total, {"loss": total, "loss.cross_entropy": entropy, **outputs}

    return loss
