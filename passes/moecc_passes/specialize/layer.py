"""Specialise one routed layer for a mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

from moecc.analysis import find_ffn_blocks
from moecc.ir.builder import Builder
from moecc.ir.conventions import convention
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.moe import emit_dropout, emit_jitter, emit_noise, emit_priority, emit_rescaled
from moecc.ir.ops.routing import RouteOp
from moecc.ir.structure import replace_value
from moecc.rewrite import P, fits
from moecc.rewrite.passes import Bounds
from moecc.types import KEY, TensorType
from moecc_passes.routed import PRODUCT, RoutedLayer, is_decoder, padding_mask, routed_layers

# The settings of a mode for routed layers, and their record in a graph.

ATTRIBUTE = "routing"
"""The graph attribute that stores the settings of its modes."""

UNSAID = "as-is"
"""The value of a policy that leaves a layer unchanged."""

ASSIGNMENT = (
    "capacity_factor", "convention", "rounding", "multiple", "minimum", "cap", "groups",
    "group_size", "order",
)  # fmt: skip
"""Settings that are attributes of ``assign_slots``."""


FACTOR = Bounds(0, is_open=True, hint="ST-MoE: 1.25 in training, 2.0 at evaluation")
GROUP = Bounds(1, hint="ST-MoE has 2 to 8 sequences in a group")


@dataclass(frozen=True)
class ModeConfig:
    """The options of ``specialize``, and the settings of a mode; None leaves a layer unchanged."""

    mode: Annotated[Literal["train", "eval"], "purpose of the graph"] = "train"
    layers: Annotated[str, "all, or a glob over locations: encoder.*, layers.3.ffn"] = "all"
    capacity_factor: Annotated[
        float | None, "bound on the rows of an expert, as a multiple of its mean load", FACTOR
    ] = None
    dropless: Annotated[bool | None, "whether to remove every bound"] = None
    convention: Annotated[
        Literal["tokens", "assignments"] | None,
        "quantity that the factor multiplies: tokens (ST-MoE), or tokens times top-k (V-MoE)",
    ] = None
    rounding: Annotated[Literal["floor", "round", "ceil"] | None, "rounding of the capacity"] = None
    multiple: Annotated[int | None, "number of which the capacity is a multiple", Bounds(1)] = None
    minimum: Annotated[int | None, "minimum capacity", Bounds(1)] = None
    cap: Annotated[bool | None, "whether the capacity is at most the tokens of a group"] = None
    groups: Annotated[int | None, "the number of token groups", Bounds(1)] = None
    group_size: Annotated[
        int | None, "tokens per group, in place of the number of groups", GROUP
    ] = None
    decoder_group_size: Annotated[
        int | None,
        "tokens per group in the decoder of an encoder-decoder, if it differs",
        Bounds(1),
    ] = None
    order: Annotated[
        Literal["choice", "token"] | None,
        "order in which slots are assigned: first choices before second choices, or "
        "token by token, which is strictly causal",
    ] = None
    policy: Annotated[
        Literal["as-is", "all", "none", "threshold", "random"],
        "policy that keeps choices after the first",
    ] = "as-is"
    threshold: Annotated[float | None, "threshold for renormalised gates; none: 0.2", Bounds(0)] = (
        None
    )
    padding_mask: Annotated[
        bool | None, "whether an input mask excludes padding from slots and losses"
    ] = None
    priority: Annotated[
        bool | None,
        "whether tokens are served in the order of their probability "
        "(batch-prioritised routing); not causal",
    ] = None
    after_drop: Annotated[
        Literal["keep", "rescale"] | None, "treatment of the remaining gates after a drop"
    ] = None
    jitter: Annotated[
        float | None,
        "train: half-width of the uniform noise around 1 that multiplies the "
        "router's input (Switch: 0.01)",
        Bounds(0, 1),
    ] = None
    input_dropout: Annotated[
        float | None, "train: dropout rate of the router's input", Bounds(0, 1)
    ] = None
    router_noise: Annotated[
        float | None, "train: standard deviation of normal noise on the logits", Bounds(0)
    ] = None
    dropout: Annotated[
        float | None,
        "train: dropout rate of the outputs of sublayers and of the hidden values of dense blocks",
        Bounds(0, 1),
    ] = None
    expert_dropout: Annotated[
        float | None, "train: dropout rate of the experts' hidden values", Bounds(0, 1)
    ] = None
    force: Annotated[bool, "allow routing in a decoder that depends on later tokens"] = False

    def settings(self) -> dict[str, Any]:
        """Return the settings that change a layer, by name."""
        names = [f.name for f in fields(ModeConfig) if f.name not in ("mode", "layers", "force")]
        values = {name: getattr(self, name) for name in names}
        return {name: v for name, v in values.items() if v is not None and v != UNSAID}

    def over(self, defaults: ModeConfig) -> ModeConfig:
        """Return these settings, completed by `defaults`."""
        mine, more = self.settings(), defaults.settings()
        if "groups" in mine:
            more = {n: v for n, v in more.items() if not n.endswith("group_size")}
        if "group_size" in mine:
            more.pop("groups", None)
        return ModeConfig(**{**more, **mine})

    def at(self, loc: str) -> ModeConfig:
        """Return the settings for a layer at `loc`: decoders may have other groups."""
        if self.decoder_group_size is None:
            return self
        size = self.decoder_group_size if is_decoder(loc) else self.group_size
        return replace(self, group_size=size, decoder_group_size=None)

    def assignment(self) -> dict[str, Any]:
        """Return the attributes of ``assign_slots`` that the settings determine."""
        attrs = {n: v for n, v in self.settings().items() if n in ASSIGNMENT}
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
    record = modes.get(mode) if isinstance(modes, Mapping) else None
    names = {f.name for f in fields(ModeConfig)}
    entries = record.items() if isinstance(record, Mapping) else ()
    return ModeConfig(**{name: value for name, value in entries if name in names})


# Undo an earlier specialisation, so that a graph may change its mode.

ORIGIN = "specialize/"
"""The prefix of the origins of added nodes."""


def is_added(value: Value) -> bool:
    """Return whether a specialisation made `value`."""
    return value.node is not None and value.node.origin.startswith(ORIGIN)


def undo(graph: Graph, covers: Callable[[str], bool]) -> None:
    """Remove all additions of specialisations, including a key that becomes unused.

    Args:
      graph: the graph.
      covers: returns whether a location is affected.
    """
    for layer in routed_layers(graph):
        operands = {w: v for w, v in layer.given().items() if not is_added(v)}
        if covers(layer.assigner.loc) and operands != layer.given():
            reassign_slots(layer.assigner, operands, {})
    for node in (*graph, graph.terminator):
        for index, value in enumerate(() if node.origin.startswith(ORIGIN) else node.operands):
            if is_added(value) and value.node is not None and covers(value.node.loc):
                before = original(value)
                # An output may be an added mask or number, which has no original.
                if before is not value and before.type == value.type:
                    node.set_operand(index, before)
    for node in graph.walk_back():
        if node.is_dead and node.origin.startswith(ORIGIN):
            node.erase()
    keys = [n for n, v in graph.inputs.items() if v.type.dtype.kind == "key" and not v.users]
    for name in keys:
        graph.erase_input(name)


def original(value: Value) -> Value:
    """Return the value that specialisations changed to `value`."""
    while is_added(value) and (match := fits(CHANGED, value.node)):
        value = match.value("x")
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


def reassign_slots(old: Node, operands: dict[str, Value], attrs: dict[str, object]) -> Node:
    """Replace the assigning node `old` by one with other operands and attributes."""
    graph = old.graph
    allowed = old.op.attrs["using"].choices
    more = {w: v for w, v in operands.items() if w in allowed}
    assigner = graph.append(
        old.op,
        [old.operands[0], *more.values()],
        {**old.attrs, **attrs, "using": tuple(more)},
        names=[v.name for v in old.results],
        loc=old.loc,
        origin=old.origin,
        before=old,
    )
    for before, after in zip(old.results, assigner.results, strict=True):
        name = before.name
        replace_value(before, after)
        graph.rename(before, graph.fresh(f"{name}.old"))
        graph.rename(after, name)
    old.erase()
    return assigner


NextKey = Callable[[], Value]
"""Returns an unused key."""

FOLDED = P.fold_key(P.any(), by=P.attr("by"))


class RandomKeys:
    """Keys for the random numbers of a graph, all derived from one input."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        # Layers specialised before that are not changed now use up their numbers already.
        used = (match.attr("by") for n in graph if (match := fits(FOLDED, n)))
        self.first = self.next = 1 + max(used, default=-1)

    def __call__(self) -> Value:
        """Return the next key, created at the top of the graph."""
        graph = self.graph
        keys = (v for v in graph.inputs.values() if v.type.dtype == KEY and not v.type.axes)
        key = next(keys, None) or graph.input(graph.fresh("key"), TensorType(KEY))
        # At the top, and without a location: layers of one structure stay equal.
        builder = Builder(graph, origin=f"{ORIGIN}key", before=next(iter(graph), None))
        self.next += 1
        return builder.fold_key(key, by=self.next - 1)

    @property
    def count(self) -> int:
        """How many keys were made."""
        return self.next - self.first


def specialise(layer: RoutedLayer, settings: ModeConfig, next_key: NextKey) -> None:
    """Set capacity, policy and noise of a mode on `layer`, without earlier additions."""
    product, scorer = layer.router, layer.scorer
    if scorer is not None and product is not None:
        x, builder = product.operands[0], _builder(product, "perturb")
        if settings.input_dropout:
            x = emit_dropout(builder, x, next_key(), settings.input_dropout)
        if settings.jitter:
            x = emit_jitter(builder, x, next_key(), settings.jitter)
        product.set_operand(0, x)
    if scorer is not None and settings.router_noise:
        builder = _builder(scorer, "noise")
        noisy = emit_noise(builder, scorer.operands[0], next_key(), settings.router_noise)
        scorer.set_operand(0, noisy)
    operands = _operands(layer, settings, next_key)
    attrs = {n: v for n, v in settings.assignment().items() if n in layer.assigner.op.attrs}
    if layer.experts_choose:
        # Experts always choose a bounded number of tokens.
        attrs = {n: v for n, v in attrs.items() if n not in ("slots", "convention")}
        attrs["capacity_factor"] = attrs.get("capacity_factor") or layer.assignment.capacity_factor
    assigner = reassign_slots(layer.assigner, operands, attrs)
    if settings.after_drop == "rescale":
        builder = _builder(layer.combine, "rescale")
        rescaled = emit_rescaled(builder, layer.gates, assigner.results[-1])
        layer.combine.set_operand(3, rescaled)
    if settings.expert_dropout:
        # Last, because slots must have numbers before dropout can be drawn for them.
        last = layer.last_matrix
        assert last is not None, "checked before anything was changed"
        builder = _builder(last, "dropout")
        dropped = emit_dropout(builder, last.operands[0], next_key(), settings.expert_dropout)
        last.set_operand(0, dropped)


def _operands(layer: RoutedLayer, settings: ModeConfig, next_key: NextKey) -> dict[str, Value]:
    """Return the operands of the slot assignment besides the experts, by word."""
    operands, route, assigner = layer.given(), layer.route, layer.assigner
    policy = settings.settings().get("policy", "all")
    if policy != "all" and layer.top_k > 1 and route is not None:
        # The policy decides by gates that add up to one.
        builder = _builder(assigner, "policy")
        gates, attrs = original(layer.gates), RouteOp.of_node(route)
        if not convention(attrs.gates).renormalised:
            gates = builder.div(gates, builder.sum(gates, axes=layer.choice))
        elif attrs.scale != 1:
            gates = builder.scale(gates, by=1 / attrs.scale)
        numbers = [builder.random_uniform(next_key(), gates)] if policy == "random" else []
        bound = 0.2 if settings.threshold is None else settings.threshold
        operands["keep"] = builder.keep_choices(
            gates, *numbers, policy=policy, threshold=bound, choice=layer.choice
        )
    if settings.priority and route is not None:
        operands["priority"] = emit_priority(_builder(assigner, "priority"), route.operands[0])
    if settings.padding_mask:
        type, tokens = layer.slots.type, layer.tokens
        operands["mask"] = padding_mask(assigner.graph, type, tokens, assigner.loc)
    elif settings.padding_mask is not None:
        operands.pop("mask", None)
    return operands


def _builder(before: Node, why: str) -> Builder:
    return Builder(before.graph, loc=before.loc, origin=f"{ORIGIN}{why}", before=before)


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
    operands = [*sublayers(graph), *((b.down, 0) for b in find_ffn_blocks(graph).blocks)]
    covered = [(node, index) for node, index in operands if covers(node.loc)]
    for node, index in covered:
        value = node.operands[index]
        node.set_operand(index, emit_dropout(_builder(node, "dropout"), value, next_key(), rate))
    return len(covered)


def sublayers(graph: Graph) -> list[Operand]:
    """Return the operands of residual sums that are computed from the stream.

    A backward search ends at the previous sums, so all searches together are linear.
    """
    sums: dict[Value, Operand] = {}
    for node in graph:
        if not fits(SUM, node) or not node.result.type.dtype.is_float:
            continue
        a, b = node.operands
        if a.type != b.type:
            continue
        for stream, branch, index in ((a, b, 1), (b, a, 0)):
            if _depends_on(stream, branch, sums):
                sums[node.result] = (node, index)
                break
    return list(sums.values())


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
