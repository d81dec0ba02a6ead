"""The moments of a source, for the model that a recipe's pipeline made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from moecc.errors import InputError
from moecc.formats.run import GRAPH, RECIPE, RunCheckpoint
from moecc.formats.trees.checkpoint import SavedMoments, TreeCheckpoint
from moecc.ir.graph import Graph
from moecc.ir.structure import clone
from moecc.model.open import read_graph
from moecc.tasks.train_source import Source
from moecc.train.recipe import OptimizerSection
from moecc.train.recipe_text import parse_recipe, recipe_file
from moecc.train.settings import (
    COUNT,
    FIRST,
    SAVED,
    carried_moments,
    count_of,
    parameter_settings,
    phases_of,
    saved_moments,
    section_at,
)
from moecc.train.state import Canonical, Weights
from moecc.types import Array, TensorType
from moecc.weights.expr import sources

Known = Mapping[str, Mapping[str, TensorType]]
"""The types of moments by kind and tensor."""

_PREFIX = SAVED.partition("{")[0]
_RESET = 'model.moments = "reset" begins with zeros'


@dataclass(frozen=True)
class CarriedState:
    """Moments over those of a trained model, and what reads its parameters and moments.

    Attributes:
      moments: expressions by name, ``moments.m.NAME``.
      checkpoint: of the run, or of the program that trained it.
      factors: by which moments are multiplied that were begun later than others, by their names.
    """

    moments: Weights
    checkpoint: RunCheckpoint | TreeCheckpoint
    factors: Mapping[str, float] = field(default_factory=dict)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows of a parameter, or of what begins with ``moments.``."""
        if not name.startswith(_PREFIX):
            return self.checkpoint.read(name, start, stop)
        if isinstance(self.checkpoint, RunCheckpoint):
            found = self.checkpoint.state.read(name, start, stop)
            return found * np.float32(self.factors[name]) if name in self.factors else found
        kind, _, tensor = name.removeprefix(_PREFIX).partition(".")
        if kind == COUNT:
            assert self.checkpoint.moments is not None, "it has been looked at"
            return np.asarray(self.checkpoint.moments.count, np.int32)
        return self.checkpoint.read_moment(kind, tensor, start, stop)


def carried_from(source: Source, section: OptimizerSection) -> CarriedState:
    """Return the moments of a model before its first step, where its source has some.

    Raises:
      InputError: the source has none, or was trained by another optimiser.
    """
    checkpoint, graph = source.model.checkpoint, over_its_source(source.made)
    factors: Mapping[str, float] = {}
    if isinstance(checkpoint, RunCheckpoint):
        known, count, factors = _of_run(checkpoint, section)
    elif isinstance(checkpoint, TreeCheckpoint) and checkpoint.moments is not None:
        known, count = _of_tree(checkpoint, checkpoint.moments, graph, section)
    else:
        raise InputError(
            "only a run, or a checkpoint of Orbax or T5X with its optimiser, has moments to carry "
            "over", where="model.moments", found=source.model.name, hint=_RESET,
        )  # fmt: skip
    return CarriedState(carried_moments(graph, section, known, count), checkpoint, factors)


def _of_run(
    checkpoint: RunCheckpoint, section: OptimizerSection
) -> tuple[Known, int, Mapping[str, float]]:
    recipe = checkpoint.run / RECIPE
    before = parse_recipe(recipe_file(recipe), str(recipe), folder=checkpoint.run).optimizer
    _require_same(before.name, section, str(checkpoint.run))
    graph, step = read_graph(str(checkpoint.run / GRAPH)), checkpoint.step
    known = saved_moments(graph, section_at(before, step.number))
    read, firsts = checkpoint.state.read, {p.first_step for p in phases_of(before)}
    counts = {n: int(read(f"{_PREFIX}{count_of(n)}")) for n in firsts if n <= step.number}
    settings = parameter_settings(graph, before)
    factors = {
        SAVED.format(kind, name): factor
        for kind, types in known.items()
        for name in types
        if (factor := _factor(before, kind, counts[settings[name].first_step], counts[0])) != 1
    }
    return known, counts[0], factors


def _factor(section: OptimizerSection, kind: str, count: int, counted: int) -> float:
    """Return what makes a mean of `count` updates one that is corrected as of `counted`.

    A mean that began with zeros is divided by 1 - decay^count (Kingma and Ba 2015, §3), but for
    Adafactor, which corrects none.
    """
    if section.name == "adafactor" or not 0 < count < counted:
        return 1.0
    decay = section.b1 if kind == FIRST else section.b2
    return (1 - decay**counted) / (1 - decay**count)


def _of_tree(
    checkpoint: TreeCheckpoint, found: SavedMoments, graph: Graph, section: OptimizerSection
) -> tuple[Known, int]:
    _require_same(found.optimizer, section, str(checkpoint.path))
    weights = [p.weight for p in graph.params.values() if p.weight is not None]
    types = {leaf.name: leaf.type for weight in weights for leaf in sources(weight)}
    known = {
        kind: {n: checkpoint.moment_type(kind, n, types[n]) for n in of if n in types}
        for kind, of in found.of.items()
    }
    return known, found.count


def _require_same(before: str, section: OptimizerSection, where: str) -> None:
    if before != section.name:
        raise InputError(
            f"the source has no moments of {section.name}", where="model.moments",
            found=f"{where} was trained by {before}", hint=_RESET,
        )  # fmt: skip


def over_its_source(made: Canonical) -> Graph:
    """Return a copy of the graph of a model whose weights read the tensors of its source."""
    graph = clone(made.graph)
    for name, param in graph.params.items():
        param.weight = made.weights[name]
    return graph
