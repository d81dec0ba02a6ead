"""The moments of a source that is a run, for the model that a recipe's pipeline made of it."""

from __future__ import annotations

from dataclasses import dataclass

from moecc.checkpoint.run.checkpoint import RunCheckpoint
from moecc.checkpoint.run.layout import GRAPH
from moecc.checkpoint.run.state import StateReader
from moecc.errors import InputError
from moecc.model.open import read_graph
from moecc.steps.carried import MOMENTS, carried_moments
from moecc.tasks.train_source import Source
from moecc.train.recipe import OptimizerSection
from moecc.train.state import Weights
from moecc.types.arrays import Array
from moecc.weights.expr import sources


@dataclass(frozen=True)
class Carried:
    """Moments over those of a run, and what reads its parameters and moments.

    Attributes:
      moments: expressions by name, ``moments.m.NAME``.
      unknown: the parameters whose moments do not follow, and are zeros.
      checkpoint: of the run.
    """

    moments: Weights
    unknown: tuple[str, ...]
    checkpoint: RunCheckpoint

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows of a parameter, or of what begins with ``moments.``."""
        if name.startswith(f"{MOMENTS}."):
            return StateReader(self.checkpoint.step.state).read(name, start, stop)
        return self.checkpoint.read(name, start, stop)


def carried_from(source: Source, section: OptimizerSection) -> Carried:
    """Return the moments that a run's go over to.

    Raises:
      InputError: the source is no run, or was trained by another optimiser.
    """
    checkpoint = source.model.checkpoint
    if not isinstance(checkpoint, RunCheckpoint):
        raise InputError(
            "only a run has moments to carry over", where="model.moments",
            found=source.model.name, hint='model.moments = "reset" begins with zeros',
        )  # fmt: skip
    old = read_graph(str(checkpoint.run / GRAPH))
    moments, unknown = carried_moments(source.made.graph, source.made.weights, old, section)
    keys = set(StateReader(checkpoint.step.state).keys())
    read = {s.name for m in moments.values() for s in sources(m)}
    missing = sorted(read - keys)
    if missing:
        raise InputError(
            f"the source has no moments of {section.name}", where="model.moments",
            expected=", ".join(missing[:3]), hint='model.moments = "reset" begins with zeros',
        )  # fmt: skip
    return Carried(moments, tuple(unknown), checkpoint)
