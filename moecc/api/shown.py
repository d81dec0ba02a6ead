"""Models and plans as a notebook shows them: a line, or a table of HTML."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from moecc.plan.chart import chart
from moecc.plan.report import plan_text
from moecc.plan.report_types import PlanReport, Report
from moecc.support.text import count_text

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

    def __repr__(self) -> str:
        return plan_text(self.report)

    def _repr_html_(self) -> str:
        return f"{chart(self.report)}<pre>{escape(plan_text(self.report))}</pre>"


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


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Return rows of a name and a text as a table of HTML."""
    cells = (f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows)
    return f"<table>{''.join(cells)}</table>"
