"""The figure of ``router_stability.py``: measures of runs over their steps, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker

STYLES = (("#D55E00", "-"), ("#0072B2", (0, (4, 1.5))))
"""Vermilion and blue of Okabe and Ito, which the colour-blind tell apart; lines differ as well."""

SMOOTHED = 2
"""How many steps before and after each one its mean is taken over."""

Line = tuple[str, str, Mapping[str, Sequence[float]]]
"""A run: its column, its kind, and its measures by name."""


@dataclass(frozen=True)
class Measure:
    """A row of the figure.

    Attributes:
      name: of the measure in a run's history.
      label: what it is, with its unit.
      reference: a value to draw a line at.
      reference_label: what that value is.
      log: whether the axis is logarithmic.
    """

    name: str
    label: str
    reference: float | None = None
    reference_label: str = ""
    log: bool = False


def draw(path: Path, measures: Sequence[Measure], runs: Sequence[Line]) -> None:
    """Draw the runs: a measure in each row, a column for each kind of setting."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = list(dict.fromkeys(title for title, _, _ in runs))
    size = (1.2 + 3.1 * len(titles), 0.8 + 1.9 * len(measures))
    with pyplot.rc_context(
        {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9.0}
    ):
        figure, grid = pyplot.subplots(
            len(measures), len(titles), sharex=True, sharey="row", squeeze=False, figsize=size,
            layout="constrained",
        )  # fmt: skip
        for column, title in zip(grid.T, titles, strict=True):
            column[0].set_title(title)
            column[-1].set_xlabel("step")
            for axes, measure in zip(column, measures, strict=True):
                draw_panel(axes, measure, [run for run in runs if run[0] == title])
        for axes, measure in zip(grid[:, 0], measures, strict=True):
            axes.set_ylabel(measure.label)
        figure.align_ylabels()
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
        figure.savefig(path, dpi=160)
        pyplot.close(figure)


def draw_panel(axes: Any, measure: Measure, runs: Sequence[Line]) -> None:
    """Draw a measure: a thin line for each seed, a thick one for their mean, a little smoothed."""
    if measure.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=8))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    kinds = dict.fromkeys(kind for _, kind, _ in runs)
    for kind, (colour, dashes) in zip(kinds, STYLES, strict=False):
        lines = [history[measure.name] for _, other, history in runs if other == kind]
        for line in lines:
            axes.plot(line, color=colour, linewidth=0.5, alpha=0.3)
        mean = smoothed(np.mean(lines, axis=0))
        axes.plot(mean, color=colour, linestyle=dashes, linewidth=1.6, label=kind)
    if measure.reference is not None:
        axes.axhline(measure.reference, color="0.5", linewidth=0.8, linestyle=":")
        where = {"xy": (1, measure.reference), "xycoords": ("axes fraction", "data")}
        place = {"xytext": (0, 2), "textcoords": "offset points", "ha": "right", "va": "bottom"}
        axes.annotate(measure.reference_label, **where, **place, color="0.4")


def smoothed(values: Any) -> Any:
    """Return the mean over each step and as many before it as after it, fewer near the ends."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    at = np.arange(len(values))
    reach = np.minimum(SMOOTHED, np.minimum(at, at[::-1]))
    return (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)
