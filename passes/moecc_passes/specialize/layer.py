"""Specialise one routed layer for a mode."""

from __future__ import annotations

from collections.abc import Callable

from moecc.ir.attributes import Policy, RouteAttrs
from moecc.ir.builder import Builder
from moecc.ir.gates import convention
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.mixtures import (
    emit_dropout,
    emit_jitter,
    emit_noise,
    emit_priority,
    emit_rescaled,
)
from moecc.rewrite import P, fits
from moecc.types.dtypes import KEY
from moecc.types.tensor import TensorType
from moecc_passes.inputs import padding_mask
from moecc_passes.routed import RoutedLayer
from moecc_passes.specialize.mode_config import ModeConfig
from moecc_passes.specialize.undo import ORIGIN, original, reassign_slots

NextKey = Callable[[], Value]
"""Returns an unused key."""

FOLDED = P.fold_key(P.any(), by=P.attr("by"))


class Keys:
    """Keys for the random numbers of a graph, all derived from one input."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        # Layers specialised before that are not changed now use up their numbers already.
        taken = (found.attr("by") for n in graph if (found := fits(FOLDED, n)))
        self.first = self.next = 1 + max(taken, default=-1)

    def __call__(self) -> Value:
        """Return the next key, created at the top of the graph."""
        # At the top, and without a location: layers of one structure stay equal.
        first = next(iter(self.graph), None)
        builder = Builder(self.graph, origin=f"{ORIGIN}key", before=first)
        key = builder.fold_key(self._input(), by=self.next)
        self.next += 1
        return key

    @property
    def count(self) -> int:
        """How many keys were made."""
        return self.next - self.first

    def _input(self) -> Value:
        for value in self.graph.inputs.values():
            if value.type.dtype == KEY and not value.type.axes:
                return value
        return self.graph.input(self.graph.fresh("key"), TensorType(KEY))


def specialise(layer: RoutedLayer, settings: ModeConfig, next_key: NextKey) -> None:
    """Set capacity, policy and noise of a mode on `layer`, without earlier additions."""
    if layer.scorer is not None:
        _perturb(layer.router, layer.scorer, settings, next_key)
    given = _given(layer, settings, next_key)
    attrs = {n: v for n, v in settings.assignment().items() if n in layer.assigner.op.attrs}
    if layer.experts_choose:
        # Experts always choose a bounded number of tokens.
        attrs = {n: v for n, v in attrs.items() if n not in ("slots", "convention")}
        attrs = attrs if attrs.get("capacity_factor") else {**attrs, **_factor(layer)}
    assigner = reassign_slots(layer.assigner, given, attrs)
    if settings.after_drop == "rescale":
        builder = _builder(layer.combine, "rescale")
        rescaled = emit_rescaled(builder, layer.gates, assigner.results[-1])
        layer.combine.set_operand(3, rescaled)
    if settings.expert_dropout:
        # Last, because slots must have numbers before dropout can be drawn for them.
        _drop_hidden(layer, settings.expert_dropout, next_key)


def _given(layer: RoutedLayer, settings: ModeConfig, next_key: NextKey) -> dict[str, Value]:
    """Return the operands of the slot assignment besides the experts, by word."""
    given = layer.given()
    policy = settings.policy or "all"
    if policy != "all" and layer.top_k > 1 and layer.route is not None:
        given["keep"] = _kept(layer, layer.route, policy, settings.threshold, next_key)
    if settings.priority and layer.route is not None:
        builder = _builder(layer.assigner, "priority")
        given["priority"] = emit_priority(builder, layer.route.operands[0])
    if settings.padding_mask:
        given["mask"] = padding_mask(
            layer.assigner.graph, layer.slots.type, layer.tokens, layer.assigner.loc
        )
    elif settings.padding_mask is not None:
        given.pop("mask", None)
    return given


def _factor(layer: RoutedLayer) -> dict[str, float]:
    return {"capacity_factor": layer.assignment.capacity_factor}


def _builder(before: Node, why: str) -> Builder:
    return Builder(before.graph, loc=before.loc, origin=f"{ORIGIN}{why}", before=before)


def _perturb(product: Node | None, scorer: Node, settings: ModeConfig, next_key: NextKey) -> None:
    if product is not None:
        x = product.operands[0]
        builder = _builder(product, "perturb")
        if settings.input_dropout:
            x = emit_dropout(builder, x, next_key(), settings.input_dropout)
        if settings.jitter:
            x = emit_jitter(builder, x, next_key(), settings.jitter)
        product.set_operand(0, x)
    if settings.router_noise:
        builder = _builder(scorer, "noise")
        noisy = emit_noise(builder, scorer.operands[0], next_key(), settings.router_noise)
        scorer.set_operand(0, noisy)


def _drop_hidden(layer: RoutedLayer, rate: float, next_key: NextKey) -> None:
    last = layer.last_matrix
    assert last is not None, "checked before anything was changed"
    builder = _builder(last, "dropout")
    last.set_operand(0, emit_dropout(builder, last.operands[0], next_key(), rate))


def _kept(
    layer: RoutedLayer, route: Node, policy: Policy, threshold: float | None, next_key: NextKey
) -> Value:
    """Return which choices the policy keeps, by gates that add up to one."""
    builder = _builder(layer.assigner, "policy")
    gates = original(layer.gates)
    made = RouteAttrs.of_node(route)
    if not convention(made.gates).renormalised:
        gates = builder.div(gates, builder.sum(gates, axes=layer.choice))
    elif made.scale != 1:
        gates = builder.scale(gates, by=1 / made.scale)
    numbers = []
    if policy == "random":
        numbers = [builder.random_uniform(next_key(), gates)]
    bound = 0.2 if threshold is None else threshold
    return builder.keep_choices(
        gates, *numbers, policy=policy, threshold=bound, choice=layer.choice
    )
