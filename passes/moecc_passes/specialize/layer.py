"""Specialise one routed layer for a mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from moecc.analysis import find_ffn_blocks
from moecc.ir.attributes import Policy, RouteAttrs
from moecc.ir.builder import Builder
from moecc.ir.conventions import convention
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.moe import emit_dropout, emit_jitter, emit_noise, emit_priority, emit_rescaled
from moecc.ir.structure import replace_value
from moecc.rewrite import P, fits
from moecc.types import KEY, TensorType
from moecc_passes.inputs import is_decoder, padding_mask
from moecc_passes.routed import PRODUCT, RoutedLayer, routed_layers

# The settings of a mode for routed layers, and their record in a graph.

ATTRIBUTE = "routing"
"""The graph attribute that stores the settings of its modes."""

UNSAID = "as-is"
"""The value, for options with ``none`` among their words, that leaves a layer unchanged."""

ASSIGNMENT = (
    "capacity_factor", "convention", "rounding", "multiple", "minimum", "cap", "groups",
    "group_size", "order",
)  # fmt: skip
"""Settings that are attributes of ``assign_slots``."""


@dataclass(frozen=True)
class ModeConfig:
    """The settings of one mode; None leaves a layer unchanged.

    Attributes:
      capacity_factor: the capacity factor.
      dropless: whether there is no bound.
      convention: what the factor multiplies.
      rounding: how the capacity is rounded.
      multiple: what it is raised to a multiple of.
      minimum: its least value.
      cap: whether it is at most the tokens of a group.
      groups: the number of token groups.
      group_size: the tokens of a group.
      decoder_group_size: that of the decoder of an encoder-decoder, where it differs.
      order: the order of filling.
      policy: which choices after the first are kept.
      threshold: what the policy compares gates with.
      padding_mask: whether padding is detected, and gets no slot.
      priority: whether tokens are assigned slots by probability.
      after_drop: ``keep`` gates unchanged, or ``rescale`` the remaining ones.
      jitter: the half width of the factors on the router's input.
      input_dropout: the dropout rate of the router's input.
      router_noise: the standard deviation of the noise on the logits.
      dropout: the dropout rate of outputs of sublayers and of dense hidden values.
      expert_dropout: the dropout rate of the experts' hidden values.
    """

    capacity_factor: float | None = None
    dropless: bool | None = None
    convention: str | None = None
    rounding: str | None = None
    multiple: int | None = None
    minimum: int | None = None
    cap: bool | None = None
    groups: int | None = None
    group_size: int | None = None
    decoder_group_size: int | None = None
    order: str | None = None
    policy: Policy | None = None
    threshold: float | None = None
    padding_mask: bool | None = None
    priority: bool | None = None
    after_drop: str | None = None
    jitter: float | None = None
    input_dropout: float | None = None
    router_noise: float | None = None
    dropout: float | None = None
    expert_dropout: float | None = None

    @classmethod
    def of(cls, item: object) -> ModeConfig:
        """Return the settings among the fields of a pass."""
        named = {f.name: getattr(item, f.name) for f in fields(cls)}
        return cls(**{n: v for n, v in named.items() if v != UNSAID})

    def over(self, other: ModeConfig) -> ModeConfig:
        """Return these settings, completed by those of `other`."""
        mine, rest = self.non_default(), other.non_default()
        if "groups" in mine:
            rest = {n: v for n, v in rest.items() if not n.endswith("group_size")}
        if "group_size" in mine:
            rest.pop("groups", None)
        return ModeConfig(**{**rest, **mine})

    def at(self, loc: str) -> ModeConfig:
        """Return the settings for a layer at `loc`: decoders may have other groups."""
        if self.decoder_group_size is None:
            return self
        size = self.decoder_group_size if is_decoder(loc) else self.group_size
        return replace(self, group_size=size, decoder_group_size=None)

    def non_default(self) -> dict[str, Any]:
        """Return the settings that are not None, by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {n: v for n, v in named.items() if v is not None}

    def assignment(self) -> dict[str, Any]:
        """Return the attributes of ``assign_slots`` that the settings determine."""
        attrs = {n: v for n, v in self.non_default().items() if n in ASSIGNMENT}
        if self.group_size:
            attrs["groups"] = 1
        elif self.groups:
            attrs["group_size"] = 0
        if self.dropless:
            attrs |= {"slots": "ragged", "capacity_factor": 0.0}
        elif self.capacity_factor is not None:
            attrs["slots"] = "capacity"
        return attrs


def recorded(graph: Graph, mode: str) -> ModeConfig:
    """Return the settings of `mode` recorded in `graph`; empty if there are none."""
    modes = graph.attrs.get(ATTRIBUTE)
    found = modes.get(mode) if isinstance(modes, Mapping) else None
    if not isinstance(found, Mapping):
        return ModeConfig()
    known = {f.name for f in fields(ModeConfig)}
    return ModeConfig(**{n: v for n, v in found.items() if n in known})


def record(graph: Graph, **modes: ModeConfig) -> None:
    """Record the settings of modes in `graph`."""
    graph.attrs[ATTRIBUTE] = {name: settings.non_default() for name, settings in modes.items()}


# Undo an earlier specialisation, so that a graph may change its mode.

ORIGIN = "specialize/"
"""The prefix of the origins of added nodes."""


def is_added(value: Value) -> bool:
    """Return whether a specialisation made `value`."""
    return value.node is not None and _made_here(value.node)


def undo(graph: Graph, covers: Callable[[str], bool]) -> None:
    """Remove all additions of specialisations, including a key that becomes unused.

    Args:
      graph: the graph.
      covers: returns whether a location is affected.
    """
    for layer in routed_layers(graph):
        if covers(layer.assigner.loc):
            _undo_slots(layer)
    for node in (*graph, graph.terminator):
        if not _made_here(node):
            _undo_operands(node, covers)
    for node in graph.walk_back():
        if node.is_dead and _made_here(node):
            node.erase()
    keys = [n for n, v in graph.inputs.items() if v.type.dtype.kind == "key" and not v.users]
    for name in keys:
        graph.erase_input(name)


def _made_here(node: Node) -> bool:
    return node.origin.startswith(ORIGIN)


def _undo_slots(layer: RoutedLayer) -> None:
    kept = {w: v for w, v in layer.given().items() if not is_added(v)}
    if kept != layer.given():
        reassign_slots(layer.assigner, kept, {})


def _undo_operands(node: Node, covers: Callable[[str], bool]) -> None:
    for index, value in enumerate(node.operands):
        if not is_added(value) or value.node is None or not covers(value.node.loc):
            continue
        before = original(value)
        # An output may be an added mask or number, which has no original.
        if before is not value and before.type == value.type:
            node.set_operand(index, before)


def original(value: Value) -> Value:
    """Return the value that specialisations changed to `value`."""
    while is_added(value) and (found := fits(CHANGED, value.node)):
        value = found.value("x")
    return value


_x = P.any("x")

CHANGED = (
    # Jitter, noise, and the end of rescaled gates.
    P.mul(_x, P.random_uniform(P.any(), P.any()))
    | P.add(_x, P.random_normal(P.any(), P.any()))
    | P.mul(_x, P.div(P.any(), P.any()))
    | P.mask(_x, P.any())
    # Dropout.
    | P.select(P.any(), P.constant(), _x)
    | P.scale(_x)
)
"""How a specialisation changes a value, one step each; see `moecc.ir.moe`."""


def reassign_slots(old: Node, given: dict[str, Value], attrs: dict[str, object]) -> Node:
    """Replace the assigning node `old` by one with other operands and attributes."""
    graph = old.graph
    allowed = old.op.attrs["using"].choices
    more = {w: v for w, v in given.items() if w in allowed}
    made = graph.append(
        old.op,
        [old.operands[0], *more.values()],
        {**old.attrs, **attrs, "using": tuple(more)},
        names=[v.name for v in old.results],
        loc=old.loc,
        origin=old.origin,
        before=old,
    )
    for before, after in zip(old.results, made.results, strict=True):
        name = before.name
        replace_value(before, after)
        graph.rename(before, graph.fresh(f"{name}.old"))
        graph.rename(after, name)
    old.erase()
    return made


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


# Dropout outside experts: on the outputs of sublayers, and on hidden values of dense blocks.

SUM = P.add(P.any(), P.any())

Operand = tuple[Node, int]
"""A node, and the position of one of its operands."""


def drop(
    graph: Graph, rate: float, next_key: Callable[[], Value], covers: Callable[[str], bool]
) -> int:
    """Add dropout to every sublayer and every dense hidden value; return to how many.

    A sublayer is norm, layer, dropout, and the sum with the residual stream (ST-MoE, eq. 4).

    Args:
      graph: the graph.
      rate: the dropout rate.
      next_key: returns an unused key.
      covers: returns whether a location is affected.
    """
    found = [*sublayers(graph), *((b.down, 0) for b in find_ffn_blocks(graph).blocks)]
    places = [(node, index) for node, index in found if covers(node.loc)]
    for node, index in places:
        builder = Builder(graph, loc=node.loc, origin=f"{ORIGIN}dropout", before=node)
        dropped = emit_dropout(builder, node.operands[index], next_key(), rate)
        node.set_operand(index, dropped)
    return len(places)


def sublayers(graph: Graph) -> list[Operand]:
    """Return the operands of residual sums that are computed from the stream.

    A backward search ends at the previous sums, so all searches together are linear.
    """
    found: dict[Value, Operand] = {}
    for node in graph:
        if not fits(SUM, node) or not node.result.type.dtype.is_float:
            continue
        a, b = node.operands
        if a.type != b.type:
            continue
        for stream, branch, index in ((a, b, 1), (b, a, 0)):
            if _depends_on(stream, branch, found):
                found[node.result] = (node, index)
                break
    return list(found.values())


def _depends_on(stream: Value, branch: Value, sums: dict[Value, Operand]) -> bool:
    """Return whether `branch` is computed from `stream`, through at least one product."""
    seen, left = {branch}, [branch]
    reaches = multiplies = False
    while left:
        node = left.pop().node
        multiplies |= fits(PRODUCT, node) is not None
        for value in node.operands if node is not None else ():
            reaches |= value is stream
            if value is not stream and value not in seen and value not in sums:
                seen.add(value)
                left.append(value)
    return reaches and multiplies
