"""The picture of the training losses after a switch, as SVG, from the lines of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
from declared import Experiment, Line

COLOURS = ("#D55E00", "#0072B2", "#009E73")
"""Vermilion, blue and green of Okabe and Ito, which the colour-blind tell apart."""

STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "font.size": 9.0,
    "svg.hashsalt": "moecc", "svg.fonttype": "none",
}  # fmt: skip
"""Text stays text, and the same results make the same file."""

Curves = dict[str, dict[int, Sequence[float]]]


def curves_of(experiment: Experiment, lines: Sequence[Line]) -> Curves:
    """Return the losses of the first steps by arm and seed, of the seeds that every arm has."""
    found: Curves = {arm: {} for arm in experiment.arms}
    for line in lines:
        if line["experiment"] == experiment.key and "curve" in line:
            found[line["arm"]][line["seed"]] = line["curve"]
    seeds = set.intersection(*({*each} for each in found.values()))
    return {arm: {seed: each[seed] for seed in sorted(seeds)} for arm, each in found.items()}


def draw_curves(experiment: Experiment, lines: Sequence[Line], path: Path) -> None:
    """Draw losses, and below them what they are less those of the first arm, step by step.

    Batches of a seed are the same in every arm, so that differences are free of what batches
    differ by.  A thin line is a seed, a thick one the mean.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = curves_of(experiment, lines)
    first = next(iter(curves))
    with matplotlib.rc_context(STYLE):
        figure, (above, below) = pyplot.subplots(
            2, 1, sharex=True, figsize=(6.4, 5.0), layout="constrained"
        )
        for (arm, each), colour in zip(curves.items(), COLOURS, strict=False):
            _lines(above, list(each.values()), colour, arm)
            if arm != first:
                less = [
                    [a - b for a, b in zip(curve, curves[first][seed], strict=True)]
                    for seed, curve in each.items()
                ]
                _lines(below, less, colour, arm)
        below.axhline(0, color=COLOURS[0], linewidth=1.0)
        above.set_ylabel("training loss, nats a byte")
        below.set_ylabel(f"less that of “{first}”")
        below.set_xlabel("step after the switch")
        above.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)


def _lines(axes: Any, curves: Sequence[Sequence[float]], colour: str, label: str) -> None:
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    steps = range(1, len(curves[0]) + 1)
    for curve in curves:
        axes.plot(steps, curve, color=colour, linewidth=0.5, alpha=0.4)
    means = [mean(values) for values in zip(*curves, strict=True)]
    axes.plot(steps, means, color=colour, linewidth=1.6, label=label)
