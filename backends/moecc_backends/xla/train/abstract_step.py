"""The training step or the forward pass of a graph on a mesh, ready to be compiled or run.

No weights are needed: parameters, state and inputs are shapes, types and shardings.  The step that
is compiled ahead of time is the step that runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moecc.ir.graph import Graph, Value
from moecc_backends.xla.trace.typed_jax import Devices, abstract_array
from moecc_backends.xla.train.loss import LOGITS, TARGETS, check_trainable
from moecc_backends.xla.train.optimizer import moments_like, optimizer
from moecc_backends.xla.train.shardings import StepShardings, TrainStepConfig, step_shardings
from moecc_backends.xla.train.step import train_step

_INTEGER = np.dtype("int32")


@dataclass(frozen=True)
class AbstractStep:
    """A jitted function and what it takes, abstractly."""

    function: Any
    arguments: tuple[Any, ...]


def make_step(
    graph: Graph, config: TrainStepConfig, devices: Devices, update: Any | None = None
) -> AbstractStep:
    """Return the step of `graph` over `devices`, which the mesh has as many of.

    Args:
      graph: the graph, for training with its losses.
      config: how it is trained or run.
      devices: in the order of the mesh.
      update: an optimiser of optax's in place of the one that is named.

    Raises:
      InputError: the mesh cuts a group of tokens, or the graph cannot be trained.
    """
    shardings = step_shardings(graph, config, devices)
    params = _params(graph, shardings, config)
    inputs = {n: _input(v, shardings, config) for n, v in graph.inputs.items()}
    if config.optimizer is None:
        return AbstractStep(jax.jit(shardings.model(graph)), (params, inputs))
    check_trainable(graph)
    update = update or optimizer(config.optimizer)
    state = params, moments_like(update, params)
    inputs[TARGETS] = _targets(graph.outputs[LOGITS], shardings, config)
    step = train_step(shardings.model(graph), update)
    kept = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(step, donate_argnums=(0,), out_shardings=(kept, None))
    return AbstractStep(jitted, (state, inputs))


def _params(
    graph: Graph, shardings: StepShardings, config: TrainStepConfig
) -> dict[str, jax.ShapeDtypeStruct]:
    kind = np.dtype("float32") if config.optimizer is not None else config.dtype.numpy
    return {
        name: abstract_array(value.type.shape, kind, shardings.param(value))
        for name, value in graph.params.items()
        if value.users
    }


def _input(value: Value, shardings: StepShardings, config: TrainStepConfig) -> jax.ShapeDtypeStruct:
    if value.type.dtype.kind == "key":
        return abstract_array((), jax.random.key(0).dtype, shardings.along(value, {}))
    kind = {"float": config.dtype.numpy, "bool": np.dtype(bool)}.get(value.type.dtype.kind)
    return _abstract(value, value.type.names, kind or _INTEGER, shardings, config)


def _targets(
    logits: Value, shardings: StepShardings, config: TrainStepConfig
) -> jax.ShapeDtypeStruct:
    tokens = tuple(n for n in logits.type.names if n != "vocab")
    return _abstract(logits, tokens, _INTEGER, shardings, config)


def _abstract(
    value: Value,
    names: tuple[str, ...],
    kind: np.dtype[np.generic],
    shardings: StepShardings,
    config: TrainStepConfig,
) -> jax.ShapeDtypeStruct:
    sizes = {n: _size(value.type[n].size, config) for n in names}
    return abstract_array(tuple(sizes.values()), jnp.dtype(kind), shardings.along(value, sizes))


def _size(size: object, config: TrainStepConfig) -> int:
    return size if isinstance(size, int) else config.sizes[str(size)]
