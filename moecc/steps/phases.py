"""Phases of a run: from one step on, groups of parameters are trained that were not before.

Routers alone can so be trained first, while what they choose from stays as it was.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moecc.train.recipe import OptimizerSection


@dataclass(frozen=True)
class Phase:
    """Steps in which the same parameters are trained.

    Attributes:
      first_step: how many steps were done before.
      section: the optimiser's part of the recipe, where groups that begin later are frozen.
    """

    first_step: int
    section: OptimizerSection


def phases_of(section: OptimizerSection) -> tuple[Phase, ...]:
    """Return the phases of a run, in order; the first begins with step 0."""
    firsts = sorted({0, *(group.from_step for group in section.groups if not group.freeze)})
    return tuple(Phase(first, _at(section, first)) for first in firsts)


def phase_at(phases: Sequence[Phase], steps: int) -> int:
    """Return which of `phases` a run is in after so many `steps`: what its next step trains."""
    return bisect_right([phase.first_step for phase in phases], steps) - 1


def section_at(section: OptimizerSection, steps: int) -> OptimizerSection:
    """Return the optimiser's part of a recipe as the step after so many takes it."""
    phases = phases_of(section)
    return phases[phase_at(phases, steps)].section


def _at(section: OptimizerSection, first: int) -> OptimizerSection:
    groups = (replace(g, freeze=g.freeze or g.from_step > first) for g in section.groups)
    return replace(section, groups=tuple(groups))
