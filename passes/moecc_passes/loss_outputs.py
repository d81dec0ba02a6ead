"""The outputs of ``add-losses``: metrics of each layer, and losses joined over layers."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from itertools import chain

from moecc.ir.builder import Builder
from moecc.ir.graph import Value
from moecc.ir.metrics import CHOSEN, MetricBuilder
from moecc_passes.routed import RoutedLayer

ORDER = ("balance", "router_z", "importance", "load", "attention_z")
"""The losses of layers, in the order in which they are returned."""

Weighted = list[tuple[str, float, Value]]
"""Losses of one layer: name, coefficient, value."""


def metrics_of(made: MetricBuilder, layer: RoutedLayer) -> dict[str, Value]:
    """Return the metrics of a layer by name: those defined for its kind of routing."""
    loads, scores = made.loads(), made.means.routed.scores
    found = {
        "left_behind": made.left_behind(),
        "gate_mean": made.gate_mean(),
        "max_violation": made.max_violation(loads),
        "dead_experts": made.dead_experts(loads),
        "loads": loads,
    }
    if not layer.experts_choose:
        found["dropped"] = made.dropped()
    if layer.assigner.attrs["slots"] == "capacity":
        found["utilisation"] = made.utilisation()
    if scores is not None:
        found["entropy"] = made.entropy(scores)
    if scores is not None and scores.count > 1:
        found["margin"] = made.margin(scores)
    return found


def tallies_of(made: MetricBuilder, layer: RoutedLayer) -> dict[str, Value]:
    """Return what adds up over the parts of a batch, and `moecc.steps.metrics` makes metrics of."""
    scores = made.means.routed.scores
    found = {
        CHOSEN: made.chosen(),
        "rows": made.rows(),
        "left_behind": made.left_behind(),
        "gate_mean": made.gate_mean(),
    }
    if not layer.experts_choose:
        found["asked"] = made.asked()
    if layer.assigner.attrs["slots"] == "capacity":
        found["utilisation"] = made.utilisation()
    if scores is not None:
        found["entropy"] = made.entropy(scores)
        found["logit_square"] = made.logit_square(scores)
    if scores is not None and scores.count > 1:
        found["margin"] = made.margin(scores)
    return found


def joined(builder: Builder, losses: Iterable[Weighted], how: str) -> Weighted:
    """Return each kind of loss once, the sum or mean over the layers that have it."""
    kinds: dict[str, list[Value]] = {}
    coefficients = {}
    for name, coefficient, value in chain.from_iterable(losses):
        kinds.setdefault(name, []).append(value)
        coefficients[name] = coefficient
    found: Weighted = []
    for name in sorted(kinds, key=ORDER.index):
        total = kinds[name][0]
        if len(kinds[name]) > 1:
            # One sum over all layers, which is the same for rolled layers.
            every = builder.stack(*kinds[name], axis="layer")
            total = (
                builder.sum(every, axes="layer")
                if how == "sum"
                else builder.mean(every, axes="layer")
            )
        found.append((name, coefficients[name], total))
    return found


def total_of(builder: Builder, losses: Weighted) -> Value:
    """Return the sum of losses, each times its coefficient."""
    kinds = {value.type.dtype.name for _, _, value in losses}
    parts = []
    for _, coefficient, value in losses:
        # The output's logits may be declared in another type than the router's.
        same = value if len(kinds) == 1 else builder.cast(value, dtype="f32")
        parts.append(builder.scale(same, by=coefficient))
    total: Value = reduce(builder.add, parts)
    return total
