"""Write the tables and the picture of docs/worth.md from the lines of `worth.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from curves_figure import COLOURS, STYLE
from scipy.stats import t as student
from worth import BASE_STEPS, DENSE, LONGER, RESULTS, SPARSE, STEPS

PAGE = Path(__file__).parents[1] / "docs" / "worth.md"
BEGIN, END = "<!-- begin tables: written by experiments/worth_page.py -->", "<!-- end tables -->"

WIDE: Any = {"decoder": "decoder_worth_wide", "base_steps": 1000}
"""The second size."""

LARGE: Any = {"decoder": "decoder_5m", "base_steps": 23_600}
"""The third, of one seed: its intervals are over documents alone."""

Line = dict[str, Any]
Lines = dict[tuple[str, int], dict[tuple[str, int], Line]]


@dataclass(frozen=True)
class Difference:
    """The loss of one arm less that of another, over texts, seeds and documents.

    Attributes:
      mean: in nats a byte, of every text the same part.
      error: its standard error: seeds and documents are both drawn.
      degrees: of freedom (Satterthwaite).
      settings: how many seeds of texts it is of.
    """

    mean: float
    error: float
    degrees: float
    settings: int

    @property
    def p(self) -> float:
        """The probability of as large a difference where there is none."""
        return float(2 * student.sf(abs(self.mean) / self.error, self.degrees))

    def reach(self, claims: int) -> float:
        """Return half of the interval of 95 %, for all of so many claims at once (Bonferroni)."""
        return float(student.ppf(1 - 0.025 / claims, self.degrees)) * self.error


def read_lines(
    path: Path = RESULTS, decoder: str = "decoder_worth", base_steps: int = BASE_STEPS
) -> Lines:
    """Return the lines of one size and base, by text and seed, then by arm and steps.

    A text with other held-out documents is another text: its arms are not compared.
    """
    lines: Lines = {}
    for line in map(json.loads, path.read_text("utf-8").splitlines()):
        if (line["decoder"], line["base_steps"]) == (decoder, base_steps):
            text = f"{line['text']} of {line['document_tokens']}"
            arm = lines.setdefault((text, line["seed"]), {})
            arm[line["arm"], line["steps"]] = line
    return lines


def difference(
    lines: Lines, one: tuple[str, int], other: tuple[str, int], seeds: int = 2
) -> Difference | None:
    """Return arm `one` less arm `other`, each with its steps, of texts with so many seeds or more.

    What seeds do is no part of the error of one seed. None if there is no such text.
    """
    by_text: dict[str, list[np.ndarray]] = {}
    tokens: dict[str, np.ndarray] = {}
    for (text, _), arms in sorted(lines.items()):
        if one in arms and other in arms:
            losses = [np.asarray(arms[arm]["document_losses"]) for arm in (one, other)]
            by_text.setdefault(text, []).append(losses[0] - losses[1])
            tokens[text] = np.asarray(arms[one]["document_tokens"], float)
    parts: list[tuple[float, int]] = []
    means = []
    for text, rows in by_text.items():
        if len(rows) < seeds:
            continue
        total = tokens[text].sum()
        by_seed = np.array([row.sum() / total for row in rows])
        mean = float(by_seed.mean())
        residuals = np.mean(rows, axis=0) - mean * tokens[text]
        count = len(residuals)
        if len(rows) > 1:
            parts.append((float(by_seed.var(ddof=1)) / len(rows), len(rows) - 1))
        parts.append((float((residuals**2).sum()) * count / (count - 1) / total**2, count - 1))
        means.append(mean)
    if not means:
        return None
    variances = [variance / len(means) ** 2 for variance, _ in parts]
    degrees = sum(variances) ** 2 / sum(
        v**2 / d for v, (_, d) in zip(variances, parts, strict=True)
    )
    settings = sum(len(rows) for rows in by_text.values() if len(rows) >= seeds)
    return Difference(float(np.mean(means)), sqrt(sum(variances)), degrees, settings)


def holm(values: list[float]) -> list[float]:
    """Return the probabilities corrected by Holm's method, in their order."""
    order = sorted(range(len(values)), key=lambda n: values[n])
    corrected, most = [0.0] * len(values), 0.0
    for rank, number in enumerate(order):
        most = max(most, min(1.0, (len(values) - rank) * values[number]))
        corrected[number] = most
    return corrected


def claims(lines: Lines, seeds: int = 2) -> list[tuple[str, Difference]]:
    """Return what the page claims: at equal executed FLOPs, and at equal processor time."""
    some = next(arms for arms in lines.values() if (SPARSE, STEPS[0]) in arms)
    flops = {arm: line["flops_per_token"] for (arm, _), line in some.items()}
    more = flops[SPARSE] / flops[DENSE]
    rows = []
    for kind, ratio in (("executed FLOPs", more), ("processor time", LONGER)):
        for steps in STEPS:
            other = ceil(steps * ratio) if ratio is more else round(steps * ratio)
            effect = difference(lines, (SPARSE, steps), (DENSE, other), seeds)
            if effect is not None:
                name = f"{steps:,} sparse steps: equal {kind} ({other:,} dense ones)"
                rows.append((name, effect))
    return rows


def parts(lines: Lines) -> list[tuple[str, Difference]]:
    """Return what each part of the recipe does, at equal executed FLOPs."""
    flops = {arm: x["flops_per_token"] for table in lines.values() for (arm, _), x in table.items()}
    rows = []
    for arm in flops:
        for steps in STEPS if arm not in (SPARSE, DENSE) else ():
            other = ceil(steps * flops[arm] / flops[SPARSE])
            effect = difference(lines, (arm, steps), (SPARSE, other))
            if effect is not None:
                beside = "" if other == steps else f" ({other:,} of the recipe)"
                rows.append((f"{arm}: after {steps:,} steps{beside}", effect))
    return rows


def table(title: str, rows: list[tuple[str, Difference]]) -> Iterator[str]:
    """Yield a table of differences, if there are some: a row and a column by their names."""
    if not rows:
        return
    cells: dict[str, dict[str, str]] = {}
    corrected = holm([effect.p for _, effect in rows])
    for (name, effect), p in zip(rows, corrected, strict=True):
        row, _, column = name.partition(": ")
        column, _, detail = column.partition(" (")
        mean = f"{effect.mean:+.4f} ± {effect.reach(len(rows)):.4f}".replace("-", "−")
        shown = "p < 0.001" if p < 0.001 else f"p {p:.3f}"
        cell = f"{mean}, {shown}{' (' if detail else ''}{detail}"
        cells.setdefault(f"{row} | {effect.settings}", {})[column] = cell
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    yield f"| {title}, nats a byte | runs of each | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 2) + "|"
    for row, values in cells.items():
        yield f"| {row} | {' | '.join(values.get(column, '') for column in columns)} |"


def draw_losses(lines: Lines, path: Path) -> None:
    """Draw held-out losses of both arms by compute, the means over all texts and seeds."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = [arms for arms in lines.values() if {SPARSE, DENSE} <= {arm for arm, _ in arms}]

    def losses(arm: str) -> dict[int, float]:
        steps = set.intersection(*({n for a, n in arms if a == arm} for arms in settings))
        return {
            n: float(np.mean([arms[arm, n]["loss"] for arms in settings])) for n in sorted(steps)
        }

    flops = {arm: line["flops_per_token"] for (arm, _), line in settings[0].items()}
    sparse = {n: loss for n, loss in losses(SPARSE).items() if n in STEPS}
    curves = (
        ("dense", 1.0, losses(DENSE)),
        ("sparse, by executed FLOPs", flops[SPARSE] / flops[DENSE], sparse),
        ("sparse, by processor time", LONGER, sparse),
    )
    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(6.4, 3.2), layout="constrained")
        axes.grid(axis="y", color="0.9", linewidth=0.6)
        for (label, ratio, values), colour in zip(curves, COLOURS, strict=True):
            at = [ratio * steps for steps in values]
            axes.plot(at, list(values.values()), color=colour, marker=".", label=label)
        axes.set_xscale("log")
        ticks = (150, 300, 600, 1200, 2400)
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("steps of the dense model for as much compute")
        axes.set_ylabel("held-out loss, nats a byte")
        axes.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)


def main() -> None:
    """Write the tables and the picture."""
    lines = read_lines()
    draw_losses(lines, PAGE.with_suffix(".svg"))
    text = PAGE.read_text("utf-8")
    before, tables = text.split(BEGIN)
    after = tables.split(END)[1]
    blocks = [*table("sparse less dense", claims(lines)), ""]
    blocks += table("less the recipe", parts(lines))
    blocks += ["", *table("the same, 185 thousand parameters", claims(read_lines(**WIDE)))]
    blocks += ["", *table("4.8 million parameters", claims(read_lines(**LARGE), seeds=1))]
    PAGE.write_text("\n".join([before.rstrip("\n"), "", BEGIN, *blocks, END]) + after)


if __name__ == "__main__":
    main()
