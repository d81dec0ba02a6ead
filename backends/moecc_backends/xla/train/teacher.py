"""The source of a run as a program: its logits are what the model is distilled from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from moecc.analysis import LOGITS
from moecc.train.batches import TEACHER
from moecc.train.events import Teacher
from moecc.train.graphs import teacher_graph
from moecc.train.recipe import Recipe
from moecc.types import KEY
from moecc_backends.xla.trace.values import NamedArrays, Outputs, PyTree
from moecc_backends.xla.train.gradients import COEFFICIENT, step_shardings
from moecc_backends.xla.train.step import TrainStep
from moecc_backends.xla.train.tensors import load


@dataclass(frozen=True)
class TeacherProgram:
    """The source that a model is distilled from, on the devices of the model.

    Attributes:
      logits: the compiled ``(params, inputs) → logits``.
      params: its parameters.
      inputs: the names of the inputs that it reads.
      keys: its random keys, by name.
      shape: shape and type of its logits.
      coefficient: returns the coefficient of the divergence in a step, by its number.
    """

    logits: PyTree
    params: NamedArrays
    inputs: tuple[str, ...]
    keys: NamedArrays
    shape: jax.ShapeDtypeStruct
    coefficient: Callable[[int], float]

    def __call__(self, batch: NamedArrays, step: int) -> Outputs:
        """Return the logits of a batch, zeros once they do not count, and their coefficient."""
        coefficient = self.coefficient(step)
        logits = jnp.zeros(self.shape.shape, self.shape.dtype, device=self.shape.sharding)
        if coefficient:
            inputs = {name: batch[name] for name in self.inputs} | dict(self.keys)
            logits = self.logits(self.params, inputs)
        return {TEACHER: logits, COEFFICIENT: jnp.float32(coefficient)}


def teacher_program(teacher: Teacher, recipe: Recipe, step: TrainStep) -> TeacherProgram:
    """Return the program of a teacher.

    Args:
      teacher: the source.
      recipe: the recipe.
      step: the step that it teaches.

    Raises:
      InputError: its logits are not like those of the model.
    """
    graph = teacher_graph(teacher.graph, recipe, step.graph)
    where = step_shardings(graph, step.spec, step.where.devices)
    abstract = {name: where.param(value) for name, value in graph.params.items() if value.users}
    model, shape = where.model(graph), step.abstract_batch[TEACHER]

    def logits(params: NamedArrays, inputs: NamedArrays) -> jax.Array:
        return model(params, inputs)[LOGITS].astype(shape.dtype)

    keys = [name for name, value in graph.inputs.items() if value.type.dtype == KEY]
    return TeacherProgram(
        jax.jit(logits), load(graph, teacher.weights, teacher.read, abstract),
        tuple(name for name in graph.inputs if name not in keys),
        {name: jax.random.key(0) for name in keys}, shape,
        lambda number: recipe.loss.distill_at(number, recipe.run.steps),
    )  # fmt: skip
