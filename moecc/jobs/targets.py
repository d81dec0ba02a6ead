"""Which families can hold a model, found by exporting it, and which of them to choose.

A dense model is taken as it would be upcycled for the family; the export is then matched in full,
so that what is said to fit is what ``convert`` writes.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace

from moecc.analysis import layer_number
from moecc.errors import InputError, Problem
from moecc.families.building import build_model, storing_problems
from moecc.families.config import FAMILY, ModelConfig
from moecc.families.decoder import DecoderConfig
from moecc.families.experts import expert_layers
from moecc.families.heads import LOGITS, hub_task
from moecc.families.mixture import MoeConfig
from moecc.families.registry import CONFIGS, decoders
from moecc.families.registry import mixtures as decoder_mixtures
from moecc.formats.open import WrappedText
from moecc.ir.graph import Graph
from moecc.ir.structure import clone
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pass
from moecc.support.untyped import JsonDict
from moecc.translate.engines import EngineVerdict, verdicts
from moecc.translate.export import Export, export_graph
from moecc.translate.propose import source_config

MANY_LAYERS = 64
"""A dense model with more layers, of few kinds, is exported with so many to see where it fits."""

ALIKE_LAYERS = 2
"""The same where all of its layers are alike: a first one, and one that follows another."""

_TRIAL = Context(allow_unmatched=True, promises=False)


@dataclass(frozen=True)
class Fit:
    """Whether a family can hold a model.

    Attributes:
      target: the family.
      passes: what was done to a dense model first; empty if nothing was.
      reasons: why it cannot; empty if it can.
      engines: the verdicts of the engines on the result.
      export: the result; None if the family cannot hold the model, or is st_moe.
    """

    target: str
    passes: str
    reasons: tuple[Problem, ...]
    engines: tuple[EngineVerdict, ...] = ()
    export: Export | None = field(default=None, compare=False, repr=False)

    @property
    def fits(self) -> bool:
        """Whether the family can hold the model."""
        return not self.reasons

    def to_json(self) -> JsonDict:
        """Return the fit as JSON values."""
        return {
            "fits": self.fits,
            "after": self.passes or None,
            "reasons": [str(reason) for reason in self.reasons],
            "engines": [verdict.to_json() for verdict in self.engines],
        }


def fits(graph: Graph, wrapped: WrappedText | None = None) -> list[Fit]:
    """Return for each family of experts whether it can hold `graph`, upcycled if it is dense.

    Args:
      graph: the model.
      wrapped: where it was read from, if a wrapper holds it.
    """
    dense = not expert_layers(graph) and "config" in graph.attrs
    graph = _shallow(graph) if dense else graph
    source = _source_of(graph)
    upcycled: dict[str, Graph | tuple[Problem, ...]] = {}
    verdicts_of_families = []
    for name in mixtures(graph):
        passes = _passes_for(name) if dense else ""
        if passes not in upcycled:
            upcycled[passes] = _upcycled(graph, passes)
        verdicts_of_families.append(_fit(upcycled[passes], name, passes, source, wrapped))
    return verdicts_of_families


def _source_of(graph: Graph) -> ModelConfig | None:
    try:
        return source_config(graph)
    except InputError:
        return None


def _shallow(graph: Graph) -> Graph:
    """Return a dense model with fewer layers, if it has more and all are like the first of them.

    Which families can hold it does not depend on their number, and to export 10,000 layers to each
    takes minutes.
    """
    config = source_config(graph)
    if not isinstance(config, DecoderConfig):
        return graph
    layers: dict[int, list[Hashable]] = {}
    for node in graph:
        number = layer_number(node.loc)
        if number is not None:
            layers.setdefault(number, []).append((node.op.name, *node.attrs.items()))
    lists = [v for v in vars(config).values() if isinstance(v, tuple) and len(v) == len(layers)]
    kinds = [(*layers[number], *(v[n] for v in lists)) for n, number in enumerate(sorted(layers))]
    most = ALIKE_LAYERS if len(set(kinds)) == 1 else MANY_LAYERS
    if len(kinds) <= most or len(set(kinds)) > len(set(kinds[:most])):
        return graph
    windows = config.sliding_windows[:most]
    try:
        return build_model(replace(config, num_hidden_layers=most, sliding_windows=windows))
    except (InputError, TypeError, ValueError):  # another list with an entry a layer
        return graph


def mixtures(graph: Graph) -> list[str]:
    """Return the families of experts with the shape of the graph's source, st_moe last."""
    source = _source_of(graph)
    if source is None or isinstance(source, DecoderConfig):
        return [*decoder_mixtures(), FAMILY]
    from moecc.families.t5 import SwitchTransformersConfig

    switch = SwitchTransformersConfig
    return [*([switch.model_type] if switch.shape() is source.shape() else []), FAMILY]


def _passes_for(target: str) -> str:
    """Return the pipeline that makes a dense model one that the family can hold."""
    family = CONFIGS[target]
    options = getattr(family, "upcycle_options", "")
    return f"upcycle{{experts=8 {options or 'top-k=2'}}}"


def _upcycled(graph: Graph, passes: str) -> Graph | tuple[Problem, ...]:
    if not passes:
        return graph
    copy = clone(graph)
    try:
        # One by one: a pipeline would verify each copy of a graph that has been verified.
        for number, item in enumerate(Pipeline.parse(passes), 1):
            run_pass(copy, item, _TRIAL, number)
    except InputError as error:
        return error.problems
    return copy


def _fit(
    candidate: Graph | tuple[Problem, ...],
    target: str,
    passes: str,
    source: ModelConfig | None = None,
    wrapped: WrappedText | None = None,
) -> Fit:
    if not isinstance(candidate, Graph):
        return Fit(target, passes, candidate)
    if target == FAMILY:
        return Fit(target, passes, tuple(storing_problems(candidate)))
    try:
        export = export_graph(candidate, target, source=source)
    except InputError as error:
        return Fit(target, passes, error.problems)
    wrapper = wrapped.holder_of(target) if wrapped is not None else None
    return Fit(target, passes, (), verdicts(export.config, wrapper), export)


@dataclass(frozen=True)
class Choice:
    """The family that was chosen for a model, why, and the model as one of it if that was tried."""

    target: str
    reason: str
    export: Export | None = None


EMITTED = "--emit torch writes the class for transformers"


def choose(graph: Graph, wrapped: WrappedText | None = None) -> Choice:
    """Choose the family to write `graph` as; whatever moecc reads is written as some family.

    A mixture stays in its family.  Else, of the families that can hold it, that which most engines
    read without misreading it, those before others that the wrapper of its source holds; of equals
    the family it came from, then the first in the order of
    `moecc.families.registry.CONFIGS`; and st_moe, which holds any graph and only moecc reads, if
    there is no other.

    Args:
      graph: the model.
      wrapped: where it was read from, if a wrapper holds it.
    """
    if LOGITS in graph.outputs:
        reason = f"auto chose {FAMILY}, which keeps the head of the source, for {hub_task(graph)}"
        return Choice(FAMILY, f"{reason}; {EMITTED}")
    fitting = _fitting(graph, wrapped)
    family = graph.family
    stays = family if issubclass(CONFIGS.get(family, ModelConfig), MoeConfig) else ""
    if not fitting:
        near = nearest_family(graph)
        changes = "; ".join(reason.message for reason in near.reasons[:3]) if near else ""
        why = f"; the nearest other is {near.target}: {changes}" if near else ""
        return Choice(FAMILY, f"auto chose {FAMILY}, which only moecc reads; {EMITTED}{why}")

    def rank(fit: Fit) -> tuple[bool, bool, int]:
        is_held = wrapped is not None and wrapped.holder_of(fit.target) is not None
        return fit.target == stays, is_held, sum(v.runs for v in fit.engines)

    best = max(fitting, key=rank)
    others = [fit.target for fit in fitting if fit is not best]
    reason = f"auto chose {best.target}"
    if best.engines:
        reason += f", which runs in {', '.join(v.engine for v in best.engines if v.runs)}"
    if others:
        reason += f"; {', '.join(others)} could hold it, too"
    return Choice(best.target, reason, best.export)


def _fitting(graph: Graph, wrapped: WrappedText | None) -> list[Fit]:
    """Return the families that can hold `graph` as it is, its own first; st_moe is not one."""
    source = _source_of(graph)
    if source is None:
        return []
    # Families of another shape, and dense ones of a mixture, could not hold the graph.
    if not isinstance(source, DecoderConfig):
        names = [
            n for n in CONFIGS if not issubclass(CONFIGS.kinds.get(n, ModelConfig), DecoderConfig)
        ]
    elif expert_layers(graph):
        names = [*decoder_mixtures()]
    else:
        names = [n for n, family in decoders().items() if not issubclass(family, MoeConfig)]
    names.sort(key=lambda name: name != graph.family)
    candidates = (_fit(graph, name, "", source, wrapped) for name in names if name != FAMILY)
    return [fit for fit in candidates if fit.fits]


def nearest_family(graph: Graph) -> Fit | None:
    """Return the family that the fewest reasons keep from holding `graph`; None if one can."""
    if not expert_layers(graph):
        return None
    source = _source_of(graph)
    tried = [_fit(graph, name, "", source) for name in mixtures(graph) if name != FAMILY]
    if any(fit.fits for fit in tried):
        return None
    return min(tried, key=lambda fit: len(fit.reasons), default=None)
