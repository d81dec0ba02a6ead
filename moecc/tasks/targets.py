"""Which families can hold a model, found by exporting it, and which of them to choose.

A dense model is taken as it would be upcycled for the family; the export is then matched in full,
so that what is said to fit is what ``convert`` writes.
"""

from __future__ import annotations

from dataclasses import dataclass

from moecc.engines.verdicts import Verdict, verdicts
from moecc.errors import InputError, Problem
from moecc.families.configs import CONFIGS, MoeConfig, SwitchTransformersConfig
from moecc.families.experts import expert_layers
from moecc.families.export import export_graph
from moecc.families.graph_layout import FAMILY
from moecc.families.propose import source_config
from moecc.ir.graph import Graph
from moecc.ir.structure import clone
from moecc.pipeline.passes import Context
from moecc.pipeline.runner import run_pipeline
from moecc.pipeline.text import Pipeline

AUTO = "auto"
"""The target that stands for the one that `choose` takes."""


@dataclass(frozen=True)
class Fit:
    """Whether a family can hold a model.

    Attributes:
      target: the family.
      passes: what was done to a dense model first; empty if nothing was.
      reasons: why it cannot; empty if it can.
      engines: the verdicts of the engines on the result.
    """

    target: str
    passes: str
    reasons: tuple[Problem, ...] = ()
    engines: tuple[Verdict, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the family can hold the model."""
        return not self.reasons

    def to_json(self) -> dict[str, object]:
        """Return the fit as JSON values."""
        return {
            "fits": self.fits,
            "after": self.passes or None,
            "reasons": [str(reason) for reason in self.reasons],
            "engines": [verdict.to_json() for verdict in self.engines],
        }


def fits(graph: Graph) -> list[Fit]:
    """Return for each family of experts whether it can hold `graph`, upcycled if it is dense."""
    dense = not expert_layers(graph) and "config" in graph.attrs
    made: dict[str, Graph | tuple[Problem, ...]] = {}
    found = []
    for name in mixtures(graph):
        passes = _passes_for(name) if dense else ""
        if passes not in made:
            made[passes] = _upcycled(graph, passes)
        found.append(_fit(made[passes], name, passes))
    return found


def mixtures(graph: Graph) -> list[str]:
    """Return the families of experts with the shape of the graph's source, st_moe last."""
    try:
        shape = source_config(graph).shape()
    except InputError:
        return [*(n for n, family in CONFIGS.items() if issubclass(family, MoeConfig)), FAMILY]
    kinds = (MoeConfig, SwitchTransformersConfig)
    same = (n for n, f in CONFIGS.items() if issubclass(f, kinds) and f.shape() is shape)
    return [*same, FAMILY]


def _passes_for(target: str) -> str:
    """Return the pipeline that makes a dense model one that the family can hold."""
    family = CONFIGS[target]
    options = getattr(family, "upcycle_options", "")
    return f"upcycle{{experts=8 {options or 'top-k=2'}}}"


def _upcycled(graph: Graph, passes: str) -> Graph | tuple[Problem, ...]:
    made = clone(graph)
    try:
        run_pipeline(made, Pipeline.parse(passes), context=Context(allow_unmatched=True))
    except InputError as error:
        return error.problems
    return made


def _fit(made: Graph | tuple[Problem, ...], target: str, passes: str) -> Fit:
    if not isinstance(made, Graph):
        return Fit(target, passes, made)
    try:
        export = export_graph(made, target)
    except InputError as error:
        return Fit(target, passes, error.problems)
    return Fit(target, passes, (), verdicts(export.config))


@dataclass(frozen=True)
class Choice:
    """The family that was chosen for a model, and why."""

    target: str
    reason: str


def choose(graph: Graph) -> Choice:
    """Choose the family to write `graph` as; whatever moecc reads is written as some family.

    Of the families that can hold it, that which most engines read without misreading it; of equals
    the family it came from, then the first in the order of `moecc.families.configs.CONFIGS`; and
    st_moe, which holds any graph and only moecc reads, if there is no other.
    """
    fitting = _fitting(graph)
    if not fitting:
        near = nearest_family(graph)
        what = "; ".join(reason.what for reason in near.reasons[:3]) if near else ""
        why = f"; the nearest other is {near.target}: {what}" if near else ""
        return Choice(FAMILY, f"auto chose {FAMILY}, which only moecc reads{why}")
    best = max(fitting, key=lambda fit: sum(v.runs for v in fit.engines))
    others = [fit.target for fit in fitting if fit is not best]
    reason = f"auto chose {best.target}"
    if best.engines:
        reason += f", which runs in {', '.join(v.engine for v in best.engines if v.runs)}"
    if others:
        reason += f"; {', '.join(others)} could hold it, too"
    return Choice(best.target, reason)


def _fitting(graph: Graph) -> list[Fit]:
    """Return the families that can hold `graph` as it is, its own first; st_moe is not one."""
    own = str(graph.attrs.get("family", ""))
    names = [own, *(name for name in CONFIGS if name != own)] if own in CONFIGS else [*CONFIGS]
    found = (_fit(graph, name, "") for name in names if name != FAMILY)
    return [fit for fit in found if fit.fits]


def nearest_family(graph: Graph) -> Fit | None:
    """Return the family that the fewest reasons keep from holding `graph`; None if one can."""
    if not expert_layers(graph):
        return None
    tried = [_fit(graph, name, "") for name in mixtures(graph) if name != FAMILY]
    if any(fit.fits for fit in tried):
        return None
    return min(tried, key=lambda fit: len(fit.reasons), default=None)
