"""All moments of a model that was made of a trained one, by what a state saves them as."""

from __future__ import annotations

from collections.abc import Mapping

from moecc.ir.graph import Graph
from moecc.steps.moment_axes import moment_types
from moecc.steps.settings import parameter_settings
from moecc.train.moments import Carried
from moecc.train.recipe import OptimizerSection
from moecc.types.tensor import TensorType
from moecc.weights.expr import Expr

SAVED = "moments.{}.{}"
"""What a moment is saved as, by its kind and its parameter."""


def saved_moments(graph: Graph, section: OptimizerSection) -> dict[str, dict[str, TensorType]]:
    """Return the types of the moments that training `graph` keeps, by kind and parameter."""
    settings = parameter_settings(graph, section)
    types = {n: graph.params[n].type for n in settings}
    return moment_types(section.name, types, settings)


def carried_moments(
    graph: Graph,
    section: OptimizerSection,
    known: Mapping[str, Mapping[str, TensorType]],
    count: int,
) -> dict[str, Expr]:
    """Return the moments of `graph` before its first step, over those of the model before.

    Args:
      graph: what a pipeline made of the model before, unrolled; its weights read the tensors of
        that model, by which its moments are saved, too.
      section: the optimiser, of both.
      known: the types of the moments before, as `saved_moments` returns them of that model.
      count: the updates that they are made of, which go on to be counted.
    """
    carried = Carried(graph, known, count, section.b1, section.b2, SAVED.format)
    return {
        SAVED.format(kind, name): carried.moment(name, kind, type)
        for kind, types in saved_moments(graph, section).items()
        for name, type in types.items()
    }
