"""The learning rate of each step: a pure function, so that a compiled step takes it as an input."""

from __future__ import annotations

from math import cos, pi, sqrt

from moecc.train.recipe import OptimizerSection, Schedule


def rate_at(section: OptimizerSection, step: int, steps: int) -> float:
    """Return the learning rate of the step with number `step`, from 0.

    After a linear warm-up the rate is constant; or falls as a cosine (Loshchilov and Hutter 2017)
    to `end_factor`; or is constant until the last `decay_steps`, in which it falls linearly (WSD,
    Hu et al. 2024), so that a longer run has the same beginning; or falls with the inverse square
    root of the step (Shazeer and Stern 2018; T5).

    Args:
      section: the highest rate, the schedule and its numbers.
      step: the number of the step.
      steps: the steps of the run.
    """
    done = step + 1
    if done <= section.warmup:
        return section.rate * done / section.warmup
    return section.rate * _factor(section, step, steps)


def _factor(section: OptimizerSection, step: int, steps: int) -> float:
    end = section.end_factor
    if section.schedule is Schedule.COSINE:
        share = _share(step, section.warmup, steps)
        return end + (1 - end) * (1 + cos(pi * share)) / 2
    if section.schedule is Schedule.WSD:
        return 1 - (1 - end) * _share(step, steps - section.decay_steps, steps)
    if section.schedule is Schedule.RSQRT:
        return sqrt(max(section.warmup, 1) / (step + 1))
    return 1.0


def _share(step: int, start: int, stop: int) -> float:
    """Return how much of the way from `start` to the last step before `stop` is done."""
    return min(max((step - start + 1) / max(stop - start, 1), 0.0), 1.0)
