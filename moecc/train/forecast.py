"""When an upcycled model passes the dense one, from the first steps of both.

Both arms of a pilot train on the same batches at a constant rate, so that the noise of batches is
in both and leaves their difference.  The gain of the sparse arm begins below zero, as routers and
balance losses are new, and grows about linearly in steps within some times the pilot; the dense
arm's loss falls with the logarithm of all its tokens.  At equal compute the dense arm is allowed
more steps: the models cross where the gain is what those steps are worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

from moecc.support.lazy import np
from moecc.train.rows import Numbers
from moecc.types import Doubles

BLOCK_STEPS = 10
"""Steps whose mean is one observation: differences of neighbouring steps are hardly related."""

FARTHEST = 8
"""Times the steps of the pilot up to which its line was seen to hold (docs/worth.md)."""

_DRAWS = 500


@dataclass(frozen=True)
class Pilot:
    """Both arms of one seed, which train on the same batches.

    Attributes:
      dense, sparse: cross entropy of each step, in nats a token, ``f64[step]``.
    """

    dense: Doubles
    sparse: Doubles


@dataclass(frozen=True)
class Crossing:
    """Steps after which the sparse model is below the dense one at equal compute.

    Attributes:
      steps: the estimate; infinite for never.
      start, slope: the gain at the switch, and its growth with each step, in nats a token.
      level, fall: the dense loss is `level` less `fall` times the logarithm of all steps.
      low, high: the interval of 95 % of the steps, over seeds and blocks of steps.
      slope_low: the lower end of that of the slope.
    """

    steps: float
    start: float
    slope: float
    level: float
    fall: float
    low: float = 0.0
    high: float = inf
    slope_low: float = 0.0

    def dense(self, steps: Doubles) -> Doubles:
        """Return the loss of the dense model after so many steps in all."""
        return self.level - self.fall * np.log(steps)

    def gain(self, steps: Doubles) -> Doubles:
        """Return by how much the sparse model is lower so many steps after the switch."""
        return self.start + self.slope * steps


def crossing_of(
    pilots: Sequence[Pilot], behind_steps: float, ratio: float, warmup: int
) -> Crossing:
    """Return where the arms cross.

    Args:
      pilots: of each seed, as many steps of both arms.
      behind_steps: the dense model's tokens before the switch, in steps of the pilot.
      ratio: the compute of a sparse step over that of a dense one.
      warmup: the first steps, in which the rate rises: they are left out.
    """
    gains = np.stack([_blocks(p.dense - p.sparse, warmup) for p in pilots])
    dense = np.stack([_blocks(p.dense, warmup) for p in pilots])
    at: Doubles = warmup + BLOCK_STEPS * (np.arange(gains.shape[1], dtype=np.float64) + 0.5)

    def fitted(seeds: Numbers, blocks: Numbers) -> Crossing:
        chosen = np.ix_(seeds, blocks)
        level, rise = _line(np.log(behind_steps + at[blocks]), dense[chosen].mean(0))
        start, slope = _line(at[blocks], gains[chosen].mean(0))
        fall = max(-rise, 0.0)
        return Crossing(_root(start, slope, fall, behind_steps, ratio), start, slope, level, fall)

    rng = np.random.default_rng(0)
    seeds, blocks = np.arange(len(pilots)), np.arange(len(at))
    draws = [
        fitted(rng.choice(seeds, len(seeds)), rng.choice(blocks, len(blocks)))
        for _ in range(_DRAWS)
    ]
    edge = _DRAWS // 40
    ends = sorted(draw.steps for draw in draws)
    slopes = sorted(draw.slope for draw in draws)
    return replace(
        fitted(seeds, blocks), low=ends[edge], high=ends[-edge - 1], slope_low=slopes[edge]
    )


def _blocks(values: Doubles, warmup: int) -> Doubles:
    count = (len(values) - warmup) // BLOCK_STEPS
    inside = values[warmup : warmup + count * BLOCK_STEPS]
    means: Doubles = inside.reshape(count, BLOCK_STEPS).mean(1)
    return means


def _line(x: Doubles, y: Doubles) -> tuple[float, float]:
    """Return the intercept and the slope of the line of least squares."""
    spread = x - x.mean()
    slope = float((spread * y).sum() / max(float((spread**2).sum()), 1e-30))
    return float(y.mean()) - slope * float(x.mean()), slope


def _root(start: float, slope: float, fall: float, behind: float, ratio: float) -> float:
    """Return the step from which on the gain exceeds what the dense arm's further steps bring."""
    steps = np.geomspace(1, 1e8, 4000)
    above = start + slope * steps > fall * np.log((behind + ratio * steps) / (behind + steps))
    last = int(np.flatnonzero(~above)[-1]) if not above.all() else -1
    return inf if last == len(steps) - 1 else float(steps[last + 1])
