"""The pass ``add-losses``: balancing losses and routing metrics as outputs of the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from itertools import chain
from typing import Annotated, Literal

from moecc.errors import InputError, Problem
from moecc.ir.builder import Builder
from moecc.ir.conventions import AUXILIARY, LOSS, METRIC
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.moe import routing_bias_of
from moecc.ir.ops.contraction import SoftmaxOp
from moecc.ir.ops.routing import RouteOp
from moecc.ir.routing_losses import (
    BALANCE_BIASES,
    CHOSEN,
    MASK,
    TOTALS,
    LossBuilder,
    Means,
    MetricBuilder,
    emit_z,
)
from moecc.rewrite.passes import (
    BALANCE,
    EXACT,
    ROUTER_Z,
    Bounds,
    Context,
    Pass,
    PassResult,
    Remark,
    coefficient,
)
from moecc_passes.routed import (
    NOTHING_ROUTED,
    RoutedLayer,
    attention_scores,
    require_no_outputs,
    routed_layers,
)

# The outputs of ``add-losses``: metrics of each layer, and losses joined over layers.

ORDER = ("balance", "router_z", "importance", "load", "attention_z")
"""The losses of layers, in the order in which they are returned."""

Weighted = list[tuple[str, float, Value]]
"""Losses of one layer: name, coefficient, value."""


def metrics_of(metrics: MetricBuilder, layer: RoutedLayer, is_part: bool) -> dict[str, Value]:
    """Return the metrics of a layer by name: those defined for its kind of routing.

    Of a part of a batch they are sums, from which the metrics of the batch are made.
    """
    scores = metrics.means.routed.scores
    loads = None if is_part else metrics.loads()
    values = {CHOSEN: metrics.chosen(), "rows": metrics.rows()} if is_part else {}
    values |= {"left_behind": metrics.left_behind(), "gate_mean": metrics.gate_mean()}
    if loads is not None:
        values["max_violation"] = metrics.max_violation(loads)
        values["dead_experts"] = metrics.dead_experts(loads)
        values["loads"] = loads
    if not layer.experts_choose:
        values |= {"asked": metrics.asked()} if is_part else {"dropped": metrics.dropped()}
    if layer.assigner.attrs["slots"] == "capacity":
        values["utilisation"] = metrics.utilisation()
    if scores is not None:
        values["entropy"] = metrics.entropy(scores)
        if is_part:
            values["logit_square"] = metrics.logit_square(scores)
        if scores.count > 1:
            values["margin"] = metrics.margin(scores)
    return values


def joined(builder: Builder, losses: Iterable[Weighted], how: str) -> Weighted:
    """Return each kind of loss once, the sum or mean over the layers that have it."""
    kinds: dict[str, list[Value]] = {}
    coefficients = {}
    for name, factor, value in chain.from_iterable(losses):
        kinds.setdefault(name, []).append(value)
        coefficients[name] = factor
    totals: Weighted = []
    for name in sorted(kinds, key=ORDER.index):
        total = kinds[name][0]
        if len(kinds[name]) > 1:
            # One sum over all layers, which is the same for rolled layers.
            stacked = builder.stack(*kinds[name], axis="layer")
            total = (builder.sum if how == "sum" else builder.mean)(stacked, axes="layer")
        totals.append((name, coefficients[name], total))
    return totals


def total_of(builder: Builder, losses: Weighted) -> Value:
    """Return the sum of losses, each times its factor."""
    kinds = {value.type.dtype.name for _, _, value in losses}
    parts = []
    for _, factor, value in losses:
        # The output's logits may be declared in another type than the router's.
        same = value if len(kinds) == 1 else builder.cast(value, dtype="f32")
        parts.append(builder.scale(same, by=factor))
    total: Value = reduce(builder.add, parts)
    return total


PREFIXES = (LOSS, METRIC, MASK)
"""The prefixes of the output names."""

ATTRIBUTE = "losses"
"""The graph attribute with the options with which losses were added."""

ORIGIN = "add-losses/"


@dataclass(frozen=True)
class AddLossesPass(Pass):
    """Add the losses that train a router, and metrics of its routing, as outputs.

    Before::

        %r = contract %n, %w {over=embed} : f32[batch=B, seq=S, expert=8] @layers.3.ffn
        %e, %g = route %r {top_k=2} : i32[batch=B, seq=S, choice=2], f32[…]
        …
        output logits = %y

    After::

        output logits = %y
        output loss.balance = %b        # N · Σ f·P, summed over layers
        output loss.router_z = %z       # the mean of (log Σ exp r)²
        output loss.auxiliary = %a      # 0.01 · balance + 0.001 · router_z
        output metric.layers.3.ffn.dropped = %d

    Formulas are in ``moecc/ir/routing_losses.py``, constants are those of ST-MoE.  A training loss
    is that of the model plus ``loss.auxiliary``.  mesh-tensorflow multiplies its z-loss by the
    coefficient of the balance loss as well, and T5X takes the mean over layers: for m layers
    its coefficients are m times these.

    With ``parts`` the graph is that of a micro-batch.  Its losses add up to those of the batch:
    a mean over tokens or groups divides by the number in the batch, which where there is padding
    are inputs ``total.…`` (the attribute ``totals`` says of what).  Its metrics are sums, too.
    """

    name = "add-losses"
    summary = "add balancing losses and routing metrics as outputs"
    must_match = True
    preserves = EXACT

    balance: Annotated[
        Literal["top-1", "k-hot", "none"], "whether f counts first choices or all of them"
    ] = "top-1"
    balance_coef: Annotated[float, "coefficient of the balance loss", Bounds(0)] = 0.01
    z_coef: Annotated[float, "coefficient of the router z-loss; 0 leaves it out", Bounds(0)] = 0.001
    importance_coef: Annotated[float, "coefficient of V-MoE's importance loss", Bounds(0)] = 0.0
    load_coef: Annotated[float, "coefficient of V-MoE's load loss", Bounds(0)] = 0.0
    load_noise: Annotated[
        float | None,
        "standard deviation of the noise in the load loss; none: that of the "
        "logits' noise, or 1/experts",
        Bounds(0, is_open=True),
    ] = None
    attention_z_coef: Annotated[
        float, "coefficient of the attention z-loss of every layer", Bounds(0)
    ] = 0.0
    output_z_coef: Annotated[
        float, "coefficient of the z-loss of the output softmax", Bounds(0)
    ] = 0.0
    over: Annotated[
        Literal["group", "sequence", "global"], "tokens over which f and P are averaged first"
    ] = "group"
    layers: Annotated[Literal["sum", "mean"], "reduction of the losses over layers"] = "sum"
    metrics: Annotated[bool, "whether to add the metrics of each layer"] = True
    parts: Annotated[
        int,
        "number of micro-batches whose losses and metrics add up to those of the "
        "batch; 0: the whole batch",
        Bounds(0),
    ] = 0
    replace: Annotated[bool, "whether to replace existing losses and metrics"] = False

    def validate(self) -> list[Problem]:
        """Return which options are out of range, or leave nothing to add."""
        problems = super().validate()
        if self.parts > 1 and self.over == "global":
            message = "a loss over the whole batch is no sum over its parts"
            expected = "group or sequence, with several parts"
            hint = "one part, or over=group"
            problems.append(Problem(message, "over", expected, "global", hint))
        if not problems and not self.metrics and not any(self._coefficients().values()):
            hint = "the paper has balance-coef=0.01 z-coef=0.001"
            problems.append(Problem("no loss and no metric is left", hint=hint))
        return problems

    def warnings(self) -> list[Problem]:
        """Return a warning where nothing spreads the tokens over the experts."""
        coefficients = self._coefficients()
        if any(coefficients[name] for name in ("balance", "importance", "load")):
            return []
        message = "no loss spreads the tokens over the experts, so a few of them may get all"
        return [Problem(message, "balance-coef", "0.01, as ST-MoE has it", f"{self.balance_coef}")]

    def lints(self) -> list[Problem]:
        """Return which coefficients the paper would not have."""
        return [
            *coefficient(
                self._coefficients()["balance"],
                BALANCE,
                "the balance loss",
                "balance-coef",
                "appendix A",
            ),
            *coefficient(self.z_coef, ROUTER_Z, "the router z-loss", "z-coef", "section 3.3"),
        ]

    def validate_after(self, earlier: Sequence[Pass]) -> list[Problem]:
        """Return whether an earlier pass adds losses already."""
        for item in () if self.replace else earlier:
            if isinstance(item, AddLossesPass) or getattr(item, "losses", False):
                return [
                    Problem(
                        "losses are added once",
                        found=f"{item.name} adds them before",
                        hint="st-moe{losses=false} adds none",
                    )
                ]
        return []

    def _coefficients(self) -> dict[str, float]:
        return {
            "balance": 0.0 if self.balance == "none" else self.balance_coef,
            "router_z": self.z_coef,
            "importance": self.importance_coef,
            "load": self.load_coef,
            "attention_z": self.attention_z_coef,
            "output_z": self.output_z_coef,
        }

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Add the outputs.

        Raises:
          InputError: the graph has such outputs already, or no logits for the output z-loss.
        """
        if self.replace:
            remove_losses(graph)
        fault, hint = "the graph has losses or metrics already", "add them once, and last"
        require_no_outputs(graph, PREFIXES, fault, hint)
        layers = routed_layers(graph)
        losses = [self._add_to_layer(graph, layer, ctx) for layer in layers]
        attentions = attention_scores(graph) if self.attention_z_coef else []
        losses += [self._attention_z(node) for node in attentions]
        builder = Builder(graph, loc="loss", origin=f"{ORIGIN}join")
        every = joined(builder, losses, self.layers)
        every += self._output_z(builder, graph)
        for name, _, value in every:
            graph.set_output(f"{LOSS}{name}", value)
        if every:
            graph.set_output(AUXILIARY, total_of(builder, every))
        graph.attrs[ATTRIBUTE] = {f.name: getattr(self, f.name) for f in fields(self)}
        added = len([n for n in graph.output_names if n.startswith(PREFIXES)])
        stats = {"layers": len(layers), "outputs-added": added}
        matched = len(layers) + len(attentions)
        missing = [] if matched else [NOTHING_ROUTED]
        return PassResult(added > 0, matched, stats, near_misses=missing)

    def _add_to_layer(self, graph: Graph, layer: RoutedLayer, ctx: Context) -> Weighted:
        builder = Builder(graph, loc=layer.assigner.loc, origin=f"{ORIGIN}layer")
        builder.before = layer.combine
        routed = layer.routed()
        means = Means(builder, routed, self.over, max(self.parts, 1))
        if self.metrics:
            if self.parts:
                _record_bias(graph, layer)
            values = metrics_of(MetricBuilder(means), layer, self.parts > 0)
            for name, value in values.items():
                graph.set_output(f"{METRIC}{layer.name}.{name}", value)
        if routed.scores is None:
            ctx.remark(Remark(layer.name, "has no loss: a hash has nothing to train"))
            return []
        if routed.scores.chosen is None and self.balance != "none":
            ctx.remark(Remark(layer.name, "has no balance loss: experts choose as many tokens"))
        losses, scores, coefficients = (
            LossBuilder(means, routed.scores),
            routed.scores,
            self._coefficients(),
        )
        std = self.load_noise or scores.noise_std or 1 / scores.count
        emitters: dict[str, Callable[[], Value]] = {"router_z": losses.router_z}
        if scores.chosen is not None:
            emitters |= {
                "balance": lambda: losses.balance(1 if self.balance == "top-1" else scores.top_k),
                "importance": losses.importance,
                "load": lambda: losses.load(std),
            }
        return [(n, coefficients[n], emit()) for n, emit in emitters.items() if coefficients[n]]

    def _attention_z(self, softmax: Node) -> Weighted:
        builder = Builder(softmax.graph, loc=softmax.loc, origin=f"{ORIGIN}attention")
        builder.before = softmax
        scores, axis = softmax.operands[0], SoftmaxOp.of_node(softmax).axis
        mean = emit_z(builder, scores, axis)
        loss = mean if self.parts < 2 else builder.scale(mean, by=1 / self.parts)
        return [("attention_z", self.attention_z_coef, loss)]

    def _output_z(self, builder: Builder, graph: Graph) -> Weighted:
        if not self.output_z_coef:
            return []
        logits = [v for v in graph.outputs.values() if "vocab" in v.type and v.type.dtype.is_float]
        if len(logits) != 1:
            raise InputError(
                "the output z-loss needs one output with an axis vocab",
                found=", ".join(graph.output_names),
                hint="output-z-coef=0 leaves it out",
            )
        return [("output_z", self.output_z_coef, emit_z(builder, logits[0], "vocab"))]


def _record_bias(graph: Graph, layer: RoutedLayer) -> None:
    """Record which output counts the choices that a layer's balance bias is updated by."""
    route = layer.route
    if route is None or "bias" not in RouteOp.of_node(route).using:
        return
    bias = routing_bias_of(route)
    if bias is not None:
        counts = graph.attrs.setdefault(BALANCE_BIASES, {})
        counts[bias.name] = f"{METRIC}{layer.name}.{CHOSEN}"


def remove_losses(graph: Graph) -> AddLossesPass | None:
    """Remove losses and metrics from `graph`; return the pass that adds them again, if any."""
    options = graph.attrs.get(ATTRIBUTE)
    if not isinstance(options, dict):
        return None
    del graph.attrs[ATTRIBUTE]
    totals = graph.attrs.pop(TOTALS, {})
    graph.attrs.pop(BALANCE_BIASES, None)
    for name in [n for n in graph.output_names if n.startswith(PREFIXES)]:
        graph.drop_output(name)
    graph.erase_dead(ORIGIN)
    for name in totals:
        graph.erase_input(name)
    names = {f.name for f in fields(AddLossesPass)}
    return AddLossesPass(**{n: v for n, v in options.items() if n in names})
