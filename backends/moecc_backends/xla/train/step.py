"""The training step of a graph: loss, gradients, and the update of its parameters by optax.

Parameters and the state of the optimiser are float32; the model computes in the type that is asked
for, its router in float32 (selective precision, ST-MoE §3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moecc.errors import InputError, MachineError, UsageError, nearest
from moecc.ir.graph import Graph

# Typed by jax in part only.
_spec: Any = PartitionSpec
_struct: Any = jax.ShapeDtypeStruct

OPTIMIZERS = ("adafactor", "adamw")
LOGITS = "logits"
AUXILIARY = "loss.auxiliary"
"""The output that `add-losses` makes of all the losses of routers."""

TARGETS = "targets"
"""The input of a step beside those of the graph: the next tokens, ``[batch, seq]``."""

IGNORED = -1
"""The target of a token that does not take part in the loss: padding."""

Tree = Mapping[str, Any]
State = tuple[Tree, Any]
"""Parameters by name, and the state of the optimiser."""

Step = Callable[[State, Tree], tuple[State, dict[str, jax.Array]]]

Model = Callable[[Tree, Tree], dict[str, jax.Array]]
"""A graph as ``(params, inputs) → outputs``: on one device, or on a mesh."""


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the mean over tokens of −log softmax(logits)[target], in float32 at least.

    No entry is picked by index, because the vocabulary may lie on several devices.

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


def optimizer(name: str, learning_rate: float = 1e-3) -> Any:
    """Return an optimiser of optax: Adafactor, factored and without momentum, or AdamW.

    Raises:
      UsageError: there is no such optimiser.
      MachineError: optax is missing.
    """
    if name not in OPTIMIZERS:
        hint = nearest(name, OPTIMIZERS) or f"optimizers: {', '.join(OPTIMIZERS)}"
        raise UsageError(f"unknown optimizer {name!r}", hint=hint)
    try:
        import optax
    except ImportError:
        raise MachineError("training needs optax: pip install 'moecc[train]'") from None
    if name == "adafactor":
        return optax.adafactor(learning_rate, momentum=None, factored=True)
    return optax.adamw(learning_rate, b1=0.9, b2=0.95, weight_decay=0.1)


def check_trainable(graph: Graph) -> None:
    """Raise InputError if `graph` has no logits to train."""
    if LOGITS not in graph.output_names:
        raise InputError(
            "a training step needs logits",
            where=graph.name,
            expected=f"an output called {LOGITS}",
            found=", ".join(graph.output_names),
        )


def loss_function(model: Model) -> Callable[[Tree, Tree], tuple[jax.Array, dict[str, jax.Array]]]:
    """Return ``(params, inputs) → (loss, metrics)`` of `model`.

    The loss is the cross entropy of the logits, and the losses of the routers if the graph has
    them (``add-losses``).  `inputs` has `TARGETS` beside the inputs of the graph.

    Args:
      model: what `moecc_backends.xla.backend.function` or
        `moecc_backends.xla.lower.shard_map.sharded_function` makes of a graph with logits.
    """

    def loss(params: Tree, inputs: Tree) -> tuple[jax.Array, dict[str, jax.Array]]:
        outputs = model(params, {n: a for n, a in inputs.items() if n != TARGETS})
        entropy = cross_entropy(outputs.pop(LOGITS), inputs[TARGETS])
        total = entropy + outputs.get(AUXILIARY, 0.0)
        return total, {"loss": total, "loss.cross_entropy": entropy, **outputs}

    return loss


def train_step(model: Model, update: Any) -> Step:
    """Return the step ``(state, inputs) → (state, metrics)`` of `model` under an optimiser.

    Args:
      model: the model with its losses, see `loss_function`.
      update: what `optimizer` returns.
    """
    loss = loss_function(model)

    def step(state: State, inputs: Tree) -> tuple[State, dict[str, jax.Array]]:
        params, moments = state
        gradients, metrics = jax.grad(loss, has_aux=True)(params, inputs)
        changes, moments = update.update(gradients, moments, params)
        return (jax.tree.map(jnp.add, params, changes), moments), metrics

    return step


@dataclass(frozen=True)
class Shapes:
    """What a step takes, without a byte of it: shapes, types and places.

    Attributes:
      params: the parameters by name.
      moments: the state of the optimiser.
      inputs: the inputs by name.
    """

    params: dict[str, jax.ShapeDtypeStruct]
    moments: Any
    inputs: dict[str, jax.ShapeDtypeStruct]

    @property
    def state(self) -> State:
        """Parameters and moments, as a step takes them."""
        return self.params, self.moments


def moments_like(update: Any, params: Mapping[str, jax.ShapeDtypeStruct]) -> Any:
    """Return the shapes of an optimiser's state, each where the parameter that it follows lies.

    A moment of a parameter's shape lies as it does.  Of Adafactor's two vectors one lacks the
    largest axis of the parameter, the other the next (Shazeer and Stern 2018, §4).
    """
    state = jax.eval_shape(update.init, dict(params))

    some = next((p.sharding for p in params.values()), None)
    everywhere = None if some is None else NamedSharding(some.mesh, _spec())

    def placed(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Any:
        names = [getattr(key, "key", getattr(key, "name", None)) for key in path]
        param = next((params[n] for n in names if isinstance(n, str) and n in params), None)
        follows = everywhere if param is None or some is None else _follow(leaf, param, names)
        return _struct(leaf.shape, leaf.dtype, sharding=follows)

    mesh = next((p.sharding.mesh for p in params.values() if p.sharding is not None), None)
    made = jax.tree_util.tree_map_with_path(placed, state)
    if mesh is None:
        return made
    everywhere = NamedSharding(mesh, _spec())
    return jax.tree.map(
        lambda leaf: (
            leaf
            if leaf.sharding is not None
            else _struct(leaf.shape, leaf.dtype, sharding=everywhere)
        ),
        made,
    )


def _follow(leaf: Any, param: Any, names: list[Any]) -> NamedSharding:
    spec = [*param.sharding.spec, *(None for _ in range(len(param.shape)))][: len(param.shape)]
    if leaf.shape == param.shape:
        return NamedSharding(param.sharding.mesh, _spec(*spec))
    order = np.argsort(param.shape)
    for name, dropped in (("v_row", order[-1]), ("v_col", order[-2] if len(order) > 1 else 0)):
        rest = (*param.shape[:dropped], *param.shape[dropped + 1 :])
        if name in names and leaf.shape == rest:
            kept = (*spec[:dropped], *spec[dropped + 1 :])
            return NamedSharding(param.sharding.mesh, _spec(*kept))
    return NamedSharding(param.sharding.mesh, _spec())
