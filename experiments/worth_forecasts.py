"""Forecasts from the first steps of the runs of `worth.py`, beside their whole curves.

    python experiments/worth_forecasts.py

writes `worth_curves.jsonl` from the runs, and prints the table of docs/worth.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import combinations
from math import inf

import numpy as np
from declared import HERE
from worth import BASE_STEPS, DENSE, SEEDS, SPARSE, TEXTS, WORK, Setting

from moecc.formats.run import METRICS, RECIPE
from moecc.train.forecast import BLOCK_STEPS, Pilot, crossing_of

CURVES = HERE / "worth_curves.jsonl"
RATIOS = (1.02, 1.2, 1.4, 1.6, 1.75, 2.0)
PILOT_STEPS, WARMUP = 300, 10


def write_curves() -> None:
    """Write the mean cross entropy of every ten steps at a constant rate, of all runs."""
    lines = []
    for text in TEXTS:
        for seed in SEEDS:
            arms = {arm: _trunk(Setting(text, seed), arm) for arm in (DENSE, SPARSE)}
            if min(map(len, arms.values())) * BLOCK_STEPS >= PILOT_STEPS:
                lines.append(json.dumps({"text": text, "seed": seed, **arms}))
    CURVES.write_text("\n".join(lines) + "\n", "utf-8")


def _trunk(setting: Setting, arm: str) -> list[float]:
    losses: dict[int, float] = {}
    for run in (WORK / setting.name).glob(f"{arm}-*"):
        if 'schedule = "constant"' in (run / RECIPE).read_text("utf-8"):
            for line in map(json.loads, (run / METRICS).read_text("utf-8").splitlines()):
                if "loss.cross_entropy" in line:
                    losses[line["step"]] = line["loss.cross_entropy"]
    count = len(losses) // BLOCK_STEPS
    every = [losses[n] for n in range(1, count * BLOCK_STEPS + 1)]
    return [round(float(x), 4) for x in np.reshape(every, (count, BLOCK_STEPS)).mean(1)]


def read_curves() -> dict[str, list[Pilot]]:
    """Return the curves by text, a seed each; a step is the mean of its ten."""
    curves: dict[str, list[Pilot]] = {}
    for line in map(json.loads, CURVES.read_text("utf-8").splitlines()):
        arms = (np.repeat(line[arm], BLOCK_STEPS) for arm in (DENSE, SPARSE))
        curves.setdefault(line["text"], []).append(Pilot(*arms))
    return curves


def measured(curves: list[Pilot], ratio: float) -> float:
    """Return where whole curves cross for good; infinite where they do not.

    The gain is smoothed by a cubic of the logarithm of steps, the dense loss by a parabola of that
    of all steps.
    """
    length = min(len(c.sparse) for c in curves)
    at = np.arange(WARMUP + 1.0, length + 1)
    gain = np.mean([c.dense[WARMUP:length] - c.sparse[WARMUP:length] for c in curves], axis=0)
    rise = np.polynomial.Polynomial.fit(np.log1p(at / 100), gain, 3)
    longest = min(len(c.dense) for c in curves)
    steps = np.arange(WARMUP + 1.0, longest + 1)
    dense = np.mean([c.dense[WARMUP:longest] for c in curves], axis=0)
    fall = np.polynomial.Polynomial.fit(np.log(BASE_STEPS + steps), dense, 2)
    inside = at[ratio * at <= longest]
    worth = fall(np.log(BASE_STEPS + inside)) - fall(np.log(BASE_STEPS + ratio * inside))
    below = np.flatnonzero(rise(np.log1p(inside / 100)) <= worth)
    if len(below) == len(inside) or (len(below) and below[-1] == len(inside) - 1):
        return inf
    return float(inside[below[-1] + 1]) if len(below) else float(inside[0])


def forecast(curves: list[Pilot], ratio: float) -> float:
    """Return the crossing that the first steps of curves say."""
    pilots = [Pilot(c.dense[:PILOT_STEPS], c.sparse[:PILOT_STEPS]) for c in curves]
    return crossing_of(pilots, BASE_STEPS, ratio, WARMUP).steps


def pairs() -> Iterator[tuple[str, float, float, float]]:
    """Yield text and seeds, ratio, and the crossing as forecast and as measured."""
    for text, curves in read_curves().items():
        for chosen in combinations(range(len(curves)), min(2, len(curves))):
            some = [curves[n] for n in chosen]
            for ratio in RATIOS:
                name = f"{text}, seeds {' and '.join(map(str, chosen))}"
                yield name, ratio, forecast(some, ratio), measured(some, ratio)


def main() -> None:
    """Write the curves and print the table."""
    write_curves()
    heads = " | ".join(map(str, RATIOS))
    print(f"| pilot, by ratio of compute | {heads} |\n|---|{'---|' * len(RATIOS)}")
    rows: dict[str, list[str]] = {}
    for name, _, said, crossing in pairs():
        rows.setdefault(name, []).append(f"{said:.0f} / {crossing:.0f}")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
