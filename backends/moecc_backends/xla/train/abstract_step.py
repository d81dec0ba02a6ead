"""The training step or the forward pass of a graph on a mesh, ready to be compiled or run.

No weights are needed: parameters, state and inputs are shapes, types and shardings.  The step that
is compiled ahead of time is the step that runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax

from moecc.ir.graph import Graph
from moecc.steps.spec import StepSpec
from moecc.types.dtypes import KEY
from moecc_backends.xla.trace.typed_jax import Devices, PyTree, abstract_array
from moecc_backends.xla.train.evaluation import abstract_arrays
from moecc_backends.xla.train.gradients import input_types
from moecc_backends.xla.train.shardings import step_shardings
from moecc_backends.xla.train.step import make_train_step


@dataclass(frozen=True)
class AbstractStep:
    """A jitted function and what it takes, abstractly."""

    function: PyTree
    arguments: tuple[PyTree, ...]


def make_step(graph: Graph, spec: StepSpec, devices: Devices) -> AbstractStep:
    """Return the step of `graph` over `devices`, which the mesh has as many of.

    Args:
      graph: the graph, for training with its losses.
      spec: how it is trained or run.
      devices: in the order of the mesh.

    Raises:
      InputError: the mesh cuts a group of tokens, or the graph cannot be trained.
    """
    if spec.optimizer is not None:
        step = make_train_step(graph, spec, devices)
        return AbstractStep(step.function, step.arguments)
    where = step_shardings(graph, spec, devices)
    params = {
        name: abstract_array(value.type.shape, spec.weight_dtype.numpy, where.param(value))
        for name, value in graph.params.items()
        if value.users
    }
    inputs = abstract_arrays(input_types(graph), spec, where)
    key = abstract_array((), jax.random.key(0).dtype, where.whole)
    inputs |= {n: key for n, v in graph.inputs.items() if v.type.dtype == KEY}
    return AbstractStep(jax.jit(where.model(graph)), (params, inputs))
