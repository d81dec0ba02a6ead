"""The moments of a source that is a run, for the model that a recipe's pipeline made of it."""

from __future__ import annotations

from dataclasses import dataclass

from moecc.checkpoint.run.checkpoint import RunCheckpoint
from moecc.checkpoint.run.layout import GRAPH, RECIPE
from moecc.checkpoint.run.state import StateReader
from moecc.errors import InputError
from moecc.ir.graph import Graph
from moecc.ir.structure import clone
from moecc.model.open import read_graph
from moecc.steps.carried import SAVED, carried_moments, saved_moments
from moecc.steps.moment_axes import COUNT
from moecc.tasks.train_source import Source
from moecc.train.recipe import OptimizerSection
from moecc.train.recipe_text import parse_recipe, recipe_file
from moecc.train.state import Canonical, Weights
from moecc.types.arrays import Array

_PREFIX = SAVED.partition("{")[0]
_RESET = 'model.moments = "reset" begins with zeros'


@dataclass(frozen=True)
class CarriedState:
    """Moments over those of a run, and what reads its parameters and moments.

    Attributes:
      moments: expressions by name, ``moments.m.NAME``.
      checkpoint: of the run.
    """

    moments: Weights
    checkpoint: RunCheckpoint

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows of a parameter, or of what begins with ``moments.``."""
        if name.startswith(_PREFIX):
            return StateReader(self.checkpoint.step.state).read(name, start, stop)
        return self.checkpoint.read(name, start, stop)


def carried_from(source: Source, section: OptimizerSection) -> CarriedState:
    """Return the moments of a model before its first step, where its source is a run.

    Raises:
      InputError: the source is no run, or was trained by another optimiser.
    """
    checkpoint = source.model.checkpoint
    if not isinstance(checkpoint, RunCheckpoint):
        raise InputError(
            "only a run has moments to carry over", where="model.moments",
            found=source.model.name, hint=_RESET,
        )  # fmt: skip
    recipe = checkpoint.run / RECIPE
    before = parse_recipe(recipe_file(recipe), str(recipe), folder=checkpoint.run).optimizer
    if before.name != section.name:
        raise InputError(
            f"the source has no moments of {section.name}", where="model.moments",
            found=f"{checkpoint.run} was trained by {before.name}", hint=_RESET,
        )  # fmt: skip
    known = saved_moments(read_graph(str(checkpoint.run / GRAPH)), before)
    count = int(StateReader(checkpoint.step.state).read(f"{_PREFIX}{COUNT}"))
    graph = over_its_source(source.made)
    return CarriedState(carried_moments(graph, section, known, count), checkpoint)


def over_its_source(made: Canonical) -> Graph:
    """Return a copy of the graph of a model whose weights read the tensors of its source."""
    graph = clone(made.graph)
    for name, param in graph.params.items():
        param.weight = made.weights[name]
    return graph
