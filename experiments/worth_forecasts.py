"""Forecasts from the first steps of the runs of `worth.py`, beside their whole curves.

    python experiments/worth_forecasts.py

writes `worth_curves.jsonl` from the runs, and prints the table of docs/worth.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import combinations, product
from math import inf

import numpy as np
from declared import HERE
from worth import DENSE, SEEDS, SPARSE, TEXTS, WORK, Setting

from moecc.formats.run import METRICS, RECIPE
from moecc.jobs.forecast import BLOCK_STEPS, Pilot, crossing_of

CURVES = HERE / "worth_curves.jsonl"
RATIOS = (1.02, 1.2, 1.4, 1.6, 1.75, 2.0)
PILOT_STEPS, WARMUP = 300, 10
BASES = (150, 400, 1200)
"""The steps of the dense model before the switch."""


def write_curves() -> None:
    """Write the mean cross entropy of every ten steps at a constant rate, of all runs."""
    lines = []
    for text, base_steps, seed in product(TEXTS, BASES, SEEDS):
        setting = Setting(text, seed, base_steps=base_steps)
        arms = {arm: _trunk(setting, arm) for arm in (DENSE, SPARSE)}
        if min(map(len, arms.values())) * BLOCK_STEPS >= PILOT_STEPS:
            facts = {"text": text, "base_steps": base_steps, "seed": seed}
            lines.append(json.dumps({**facts, **arms}))
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


def read_curves() -> dict[tuple[str, int], list[Pilot]]:
    """Return curves by text and steps of the base, a seed each; a step is the mean of its ten."""
    curves: dict[tuple[str, int], list[Pilot]] = {}
    for line in map(json.loads, CURVES.read_text("utf-8").splitlines()):
        arms = (np.repeat(line[arm], BLOCK_STEPS) for arm in (DENSE, SPARSE))
        curves.setdefault((line["text"], line["base_steps"]), []).append(Pilot(*arms))
    return curves


def measured(curves: list[Pilot], ratio: float, base_steps: int) -> float:
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
    fall = np.polynomial.Polynomial.fit(np.log(base_steps + steps), dense, 2)
    inside = at[ratio * at <= longest]
    worth = fall(np.log(base_steps + inside)) - fall(np.log(base_steps + ratio * inside))
    below = np.flatnonzero(rise(np.log1p(inside / 100)) <= worth)
    if len(below) == len(inside) or (len(below) and below[-1] == len(inside) - 1):
        return inf
    return float(inside[below[-1] + 1]) if len(below) else float(inside[0])


def forecast(curves: list[Pilot], ratio: float, base_steps: int) -> float:
    """Return the crossing that the first steps of curves say."""
    pilots = [Pilot(c.dense[:PILOT_STEPS], c.sparse[:PILOT_STEPS]) for c in curves]
    return crossing_of(pilots, base_steps, ratio, WARMUP).steps


def pairs() -> Iterator[tuple[str, float, float, float]]:
    """Yield text, base and seeds, ratio, and the crossing as forecast and as measured."""
    for (text, base_steps), curves in read_curves().items():
        for chosen in combinations(range(len(curves)), min(2, len(curves))):
            some = [curves[n] for n in chosen]
            for ratio in RATIOS:
                name = f"{text}, {base_steps} steps, seeds {' and '.join(map(str, chosen))}"
                crossing = measured(some, ratio, base_steps)
                yield name, ratio, forecast(some, ratio, base_steps), crossing


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
