"""Models and plans as a notebook shows them: a line, or a table of HTML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moecc.plan.report import PlanReport, Report, plan_text
from moecc.plan.search import seconds_text
from moecc.plan.sweeps import SweepPoint, SweepReport, sweep_text
from moecc.support.page import render
from moecc.support.text import brief, count_text, size_text

if TYPE_CHECKING:
    from moecc.families.describe import Description
    from moecc.pipeline.passes import Preserves
    from moecc.pipeline.text import Pipeline


@dataclass(frozen=True, repr=False)
class StepPlan:
    """A plan of a step on a machine.

    Attributes:
      report: its numbers, the keys as ``docs/cli.md`` has them.
    """

    report: Report

    @property
    def best(self) -> PlanReport:
        """The fastest strategy that fits and keeps the function."""
        return self.report["best"]

    def __str__(self) -> str:
        return plan_text(self.report)

    def __repr__(self) -> str:
        best, machine = self.best, self.report["machine"]
        mesh = ",".join(f"{name}={size}" for name, size in best["mesh"].items())
        rows = [
            ("", f"{self.report['model']} on {machine['name']}"), ("mesh", mesh or "one device"),
            ("step", seconds_text(best["seconds"])),
            ("memory", f"{size_text(best['total_bytes'])} of {size_text(machine['usable_bytes'])}"),
        ]  # fmt: skip
        return brief("moecc.StepPlan", rows)

    def _repr_html_(self) -> str:
        return render("text.html", text=plan_text(self.report))


@dataclass(frozen=True, repr=False)
class PlanSweep:
    """Plans of one model with other numbers of experts, choices and capacities.

    Attributes:
      report: the numbers, the keys as ``docs/cli.md`` has them.
      pipeline: the passes of the models, as text.
    """

    report: SweepReport
    pipeline: str = ""

    @property
    def points(self) -> list[SweepPoint]:
        """The models, each planned, or with the problem that it has."""
        return self.report["points"]

    def __str__(self) -> str:
        return sweep_text(self.report)

    def __repr__(self) -> str:
        axes = (f"{n}={','.join(map(str, v))}" for n, v in self.report["axes"].items())
        planned = sum(point["best"] is not None for point in self.points)
        rows = [
            ("", f"{self.report['model']} on {self.report['machine']['name']}"),
            ("", " ".join(axes)), ("planned", f"{planned} of {len(self.points)}"),
        ]  # fmt: skip
        return brief("moecc.PlanSweep", rows)

    def _repr_html_(self) -> str:
        return render("text.html", text=sweep_text(self.report))


def summary(
    name: str, facts: Description, pipeline: Pipeline, preserves: Preserves
) -> dict[str, str]:
    """Return what is said of a model in a line: a text for each name, empty if there is none."""
    experts = {f"{layer.experts} experts, top-{layer.top_k}" for layer in facts.expert_layers}
    return {
        "name": name,
        "family": facts.family,
        "layers": str(facts.layers),
        "parameters": count_text(facts.parameters.total),
        "active": count_text(facts.parameters.active),
        "experts": "; ".join(sorted(experts)),
        "pipeline": str(pipeline),
        "preserves": str(preserves) if len(pipeline) else "",
    }
