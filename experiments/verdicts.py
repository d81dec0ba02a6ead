"""What results say of claims: effects over seeds, and whether they show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import mean, stdev

from declared import SEEDS, Experiment, Line

_T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""The 97.5 % quantile of Student's t by the number of seeds."""


class Verdict(Enum):
    """What is said of a claim."""

    SHOWN = "reproduced"
    OPPOSITE = "the opposite"
    NOT_SHOWN = "not shown"
    NOT_RUN = "not run"
    NOT_MEASURABLE = "not measurable here"


@dataclass(frozen=True)
class Effect:
    """Differences of held-out losses between two arms, seed by seed, in nats a token.

    Attributes:
      values: the first arm less the second, of the same seed: same dense model, same batches.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return mean(self.values)

    @property
    def half_width(self) -> float:
        """Half of the interval of 95 % for the mean, over seeds; infinite for one seed."""
        count = len(self.values)
        if count < 2:
            return float("inf")
        return _T_95[min(count, 10)] * stdev(self.values) / count**0.5

    @property
    def verdict(self) -> Verdict:
        """Reproduced where the interval is below 0, with three seeds at least."""
        if len(self.values) < len(SEEDS):
            return Verdict.NOT_RUN
        if self.mean + self.half_width < 0:
            return Verdict.SHOWN
        return Verdict.OPPOSITE if self.mean - self.half_width > 0 else Verdict.NOT_SHOWN


def losses(lines: Sequence[Line], experiment: str, arm: str) -> dict[tuple[str, int], float]:
    """Return the held-out losses of an arm by the data and the seed."""
    return {
        (line["data"], line["seed"]): line["loss"]
        for line in lines
        if (line["experiment"], line["arm"]) == (experiment, arm)
    }


def effect_of(lines: Sequence[Line], experiment: Experiment, claim: str) -> Effect:
    """Return what was measured of a claim, over the seeds that both arms have on the same data."""
    first, second = (losses(lines, experiment.key, arm) for arm in experiment.claims[claim])
    return Effect(tuple(first[s] - second[s] for s in sorted(first.keys() & second.keys())))


def verdict_of(lines: Sequence[Line], experiment: Experiment, claim: str) -> Verdict:
    """Return what is said of a claim: nothing, where what it rests on does not show."""
    found = effect_of(lines, experiment, claim).verdict
    if not experiment.measures or Verdict.NOT_RUN is found:
        return found
    ground = effect_of(lines, experiment, experiment.measures).verdict
    return found if ground is Verdict.SHOWN else Verdict.NOT_MEASURABLE
