"""Forecasts from the first steps of the runs of `worth.py`, beside their whole curves.

    python experiments/worth_forecasts.py

writes `worth_curves.jsonl` from the runs, and prints the table of docs/worth.md and its sums.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import combinations, product
from math import inf
from typing import Any

import numpy as np
from declared import HERE
from worth import ARMS, DENSE, SEEDS, SPARSE, TEXTS, WORK, Setting

from moecc.formats.run import METRICS, RECIPE
from moecc.jobs.forecast import BLOCK_STEPS, Crossing, Pilot, crossing_of, refusals

CURVES = HERE / "worth_curves.jsonl"
RATIOS = (1.02, 1.2, 1.4, 1.6, 1.75, 2.0, 3.0, 4.0)
NEAR = 1.3
"""The factor within which a forecast is taken as right."""
EARLY_STEPS = 60
"""Crossings up to here are not told apart: the line of a gain begins there."""

PILOT_STEPS, WARMUP = 300, 10
BASES = (
    *(("decoder_worth", steps) for steps in (150, 300, 400, 600, 800, 1200, 2000)),
    ("decoder_worth_wide", 1000),
    ("decoder_5m", 23_600),
)
"""Dense models: the decoder, and its steps before the switch."""


def write_curves() -> None:
    """Write the mean cross entropy of every ten steps at a constant rate, of all runs.

    A setting of which both arms have run is written anew, with the arms that have: those of an
    earlier machine may have read another text.  Any other keeps its line.
    """
    lines = read_lines()
    for text, base, seed in product(TEXTS, BASES, SEEDS):
        setting = Setting(text, seed, *base)
        curves = {arm: _trunk(setting, arm) for arm in (DENSE, *ARMS)}
        long = {arm: x for arm, x in curves.items() if len(x) > PILOT_STEPS // BLOCK_STEPS}
        if DENSE in long and SPARSE in long:
            lines[setting] = {**asdict(setting), **long}
    text = "\n".join(json.dumps(line) for line in lines.values())
    CURVES.write_text(f"{text}\n", "utf-8")


def read_lines() -> dict[Setting, dict[str, Any]]:
    """Return the lines of `worth_curves.jsonl`, each with the curves of all arms of a setting."""
    names = [field.name for field in fields(Setting)]
    lines = map(json.loads, CURVES.read_text("utf-8").splitlines())
    return {Setting(*(line[name] for name in names)): line for line in lines}


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


def read_curves(arm: str = SPARSE) -> dict[tuple[str, str, int], list[Pilot]]:
    """Return curves by decoder, text and steps of the base, a seed each.

    A step is the mean of its ten.
    """
    curves: dict[tuple[str, str, int], list[Pilot]] = {}
    for setting, line in read_lines().items():
        if arm in line:
            pilot = Pilot(*(np.repeat(line[name], BLOCK_STEPS) for name in (DENSE, arm)))
            key = (setting.decoder, setting.text, setting.base_steps)
            curves.setdefault(key, []).append(pilot)
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


@dataclass(frozen=True)
class Pair:
    """Both arms at a ratio of compute: what the first steps say, and what whole curves do.

    Attributes:
      name: decoder, text, steps of the base and seeds.
      ratio: the compute of a sparse step over that of a dense one.
      forecast: what the first steps say.
      crossing: where whole curves cross; infinite where they do not.
      no: why `moecc forecast` says no where the steps that were measured are the budget, or None.
    """

    name: str
    ratio: float
    forecast: Crossing
    crossing: float
    no: str | None

    @property
    def is_right(self) -> bool:
        """Whether the crossing is near the forecast, or the answer no where nothing crosses."""
        if self.crossing == inf:
            return self.no is not None
        said = self.forecast.steps
        are_early = max(said, self.crossing) <= EARLY_STEPS
        return are_early or 1 / NEAR <= said / self.crossing <= NEAR

    @property
    def is_inside(self) -> bool:
        """Whether the crossing is in the interval of the forecast."""
        return self.forecast.low <= self.crossing <= self.forecast.high

    @property
    def cell(self) -> str:
        """The crossing as forecast, or no where nothing crosses, and as measured."""
        if self.crossing < inf:
            return f"{self.forecast.steps:.0f} / {self.crossing:.0f}"
        return f"{'yes' if self.no is None else 'no'} / never"


def pairs(arm: str, ratios: Sequence[float] = RATIOS) -> Iterator[list[Pair]]:
    """Yield every two seeds of a text and a base, each at every ratio of compute."""
    for (decoder, text, base_steps), curves in read_curves(arm).items():
        for chosen in combinations(range(len(curves)), min(2, len(curves))):
            some = [curves[n] for n in chosen]
            pilots = [Pilot(c.dense[:PILOT_STEPS], c.sparse[:PILOT_STEPS]) for c in some]
            seeds = " and ".join(map(str, chosen))
            name = f"{decoder}, {text}, {base_steps} steps, seeds {seeds}"
            row = []
            for ratio in ratios:
                said = crossing_of(pilots, base_steps, ratio, WARMUP)
                budget = min(min(len(c.sparse), len(c.dense) / ratio) for c in some)
                no, _ = next(refusals(said, PILOT_STEPS, len(some), budget, inf), (None, ""))
                crossing = measured(some, ratio, base_steps)
                row.append(Pair(name, ratio, said, crossing, no))
            yield row


def main() -> None:
    """Write the curves and print the tables: forecasts beside crossings, "no" beside "never"."""
    write_curves()
    heads = " | ".join(map(str, RATIOS))
    print(f"| pilot, by ratio of compute | {heads} |\n|---|{'---|' * len(RATIOS)}")
    rows = {arm: list(pairs(arm)) for arm in ARMS}
    for arm, of_arm in rows.items():
        for row in of_arm:
            print(f"| {arm}: {row[0].name} | {' | '.join(pair.cell for pair in row)} |")
    for title, arms in (("the recipe", [SPARSE]), ("all arms", [*ARMS])):
        columns = list(zip(*(row for arm in arms for row in rows[arm]), strict=True))
        crossing = [[x for x in column if x.crossing < inf] for column in columns]
        never = [[x.is_right for x in column if x.crossing == inf] for column in columns]
        near = [[x.is_right for x in some] for some in crossing]
        inside = [[x.is_inside for x in some] for some in crossing]
        kinds = {"crossings near": near, "in the interval": inside, "no to never": never}
        for kind, answers in kinds.items():
            cells = " | ".join(f"{sum(right)} of {len(right)}" for right in answers)
            print(f"| {title}: {kind} | {cells} |")


if __name__ == "__main__":
    main()
