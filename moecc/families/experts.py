"""The expert layers of a graph, found by their operations and identified by their locations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod

from moecc.families.encdec import Experts
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Node, Value, setter_of
from moecc.ir.moe import groups_of, routing_bias_of
from moecc.ir.operation import OpDef
from moecc.ir.ops.contraction import ProductOp
from moecc.ir.ops.routing import RouteOp
from moecc.ir.ops.slots import SlotsOp, assigner
from moecc.ir.traits import RowMove
from moecc.rewrite import P, match

# A bound on the tokens of one sequence per expert, as in switch_transformers.
#
# The capacity of ``assign_slots`` counts in groups of a fixed number of tokens, but the length of a
# sequence is unknown when a graph is built.  So it is built of other operations: a token's position
# at its expert is the number of tokens up to it that chose the same one, and ``assign_slots`` keeps
# positions up to the bound.

NEXT = "kv_seq"

_WITHIN = P.broadcast(P.less(P.any("turn"), P.constant(value=P.attr("bound"))), P.any("like"))
"""Whether a position is within the bound."""


def emit_sequence_capacity(builder: Builder, experts: Experts, chosen: Value) -> Value:
    """Return which choices are within the bound, ``pred[batch, seq, choice=1]``.

    Args:
      builder: where operations are appended.
      experts: with top-1 routing and a `sequence_capacity`.
      chosen: the expert of each token, ``[batch, seq, choice=1]``.
    """
    hot = builder.one_hot(chosen, into=(("expert", experts.count),))
    # bfloat16 does not represent all integers above 256 exactly.
    mine = builder.cast(builder.sum(hot, axes="choice"), dtype="f32")
    here = builder.positions(chosen, axis="seq", name="positions")
    there = builder.rename(here, axis="seq", to=NEXT)
    before = builder.cast(builder.causal(here, there), dtype="f32")
    others = builder.rename(mine, axis="seq", to=NEXT)
    counts = builder.contract(others, before, over=NEXT, name="counts")
    turn = builder.sum(builder.mul(counts, mine), axes="expert", name="turn")
    bound = builder.constant(value=experts.sequence_capacity + 0.5, dtype="f32")
    return builder.broadcast(builder.less(turn, bound), chosen, name="kept")


def sequence_capacity_of(slots: Node) -> int:
    """Return the bound on the choices of an ``assign_slots``, or 0."""
    bound = next((v.node for v in slots.operands[1:] if v.node is not None), None)
    match_ = None if bound is None else match(_WITHIN, bound)
    if match_ is None:
        return 0
    return int(match_.attr("bound"))


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """The facts about one mixture of experts that a config states.

    Attributes:
      loc: its location in the model.
      experts: the number of experts.
      top_k: experts per token.
      gates: the gate convention.
      scale: the factor on the gates.
      slots: ``ragged`` (dropless) or ``capacity``.
      groups: the number of token groups.
      width: the neurons of one expert, 0 if unknown.
      shared: the neurons of a shared expert, 0 if there is none.
      shared_gate: whether the shared expert has a sigmoid gate.
      bias: whether a bias takes part in the choice of experts.
      logits_bias: whether a parameter is added to the router's logits.
      floor: what is added to the sum that gates are divided by.
      weighs_inputs: whether gates multiply what experts read.
      expert_groups: how many equal groups the experts are in.
      open_groups: in how many of them a token chooses.
      sequence_capacity: the most tokens of one sequence that an expert takes; 0 for no such bound.
    """

    loc: str
    experts: int
    top_k: int
    gates: str = "renormalised"
    scale: float = 1.0
    slots: str = "ragged"
    groups: int = 1
    width: int = 0
    shared: int = 0
    shared_gate: bool = False
    bias: bool = False
    logits_bias: bool = False
    floor: float = 0.0
    weighs_inputs: bool = False
    expert_groups: int = 1
    open_groups: int = 1
    sequence_capacity: int = 0

    def without_location(self) -> ExpertLayer:
        """Return the same layer without its location, for comparison with others."""
        return replace(self, loc="")

    def __str__(self) -> str:
        shared = f", shared {self.shared}" if self.shared else ""
        gates = self.gates if self.scale == 1 else f"{self.gates} x {self.scale:g}"
        return f"{self.experts} experts of {self.width}, top-{self.top_k}, {gates}{shared}"


def expert_layers(graph: Graph) -> list[ExpertLayer]:
    """Return the expert layers of `graph`, in order.

    A ``route`` whose choices get no slots does not count; it may serve a metric.
    """
    routes = (node for node in graph if node.op.routes)
    placed = ((route, _user(route.results[0], lambda op: op.assigns_slots)) for route in routes)
    return [_layer_of(route, slots) for route, slots in placed if slots is not None]


def _layer_of(route: Node, slots: Node) -> ExpertLayer:
    attrs, assignment = RouteOp.of_node(route), SlotsOp.of_node(slots)
    size = route.operands[0].type[attrs.axis].size
    dispatch = _user(slots.result, lambda entry: entry.moves is RowMove.TO_SLOTS)
    combine = _user(slots.result, lambda entry: entry.moves is RowMove.TO_TOKENS)
    shared, gated = _shared(combine) if combine else (0, False)
    groups = groups_of(route)
    gates, scale, floor = _divided(route) or (attrs.gates, attrs.scale, 0.0)
    rows = dispatch.result if dispatch else None
    weighted = None if rows is None else weighted_inputs(rows)
    return ExpertLayer(
        loc=route.loc,
        experts=size if isinstance(size, int) else 0,
        top_k=attrs.top_k,
        gates=gates,
        scale=scale,
        slots=assignment.slots,
        groups=assignment.groups,
        width=0 if rows is None else _width(rows if weighted is None else weighted),
        shared=shared,
        shared_gate=gated,
        bias=routing_bias_of(route) is not None,
        logits_bias=_is_biased(route.operands[0]),
        floor=floor,
        weighs_inputs=weighted is not None,
        expert_groups=groups[0],
        open_groups=groups[1],
        sequence_capacity=sequence_capacity_of(slots),
    )


_DIVIDED = P.div(
    P.any("gates"), P.add(P.sum(P.any("gates"), axes="choice"), P.constant(value=P.attr("floor")))
)
"""Gates that are divided by their sum and some more."""

_SCALED = P.scale(P.any("gates"), by=P.attr("scale"))


def _divided(route: Node) -> tuple[str, float, float] | None:
    """Return convention, factor and floor of sigmoids divided by their sum and a floor."""
    attrs, gates = RouteOp.of_node(route), route.results[1]
    matches = (match(_DIVIDED, user) for user in gates.users)
    divided = next((m for m in matches if m is not None), None)
    if divided is None or attrs.gates != "sigmoid" or attrs.scale != 1:
        return None
    quotient = next(user for user in gates.users if match(_DIVIDED, user)).result
    scales = (match(_SCALED, user) for user in quotient.users)
    scale = next((float(m.attr("scale")) for m in scales if m is not None), 1.0)
    return "sigmoid-renormalised", scale, float(divided.attr("floor"))


def _is_biased(logits: Value) -> bool:
    node = logits.node
    return node is not None and node.op.is_sum and any(v.is_param for v in node.operands)


def _user(value: Value, is_wanted: Callable[[OpDef], bool]) -> Node | None:
    return next((node for node in value.users if is_wanted(node.op)), None)


_WEIGHTED = P.weight_rows(P.any("rows"), P.any())


def weighted_inputs(rows: Value) -> Value | None:
    """Return dispatched rows times their gates, if that is what experts read."""
    products = (match(_WEIGHTED, user) for user in rows.users)
    return next((m.root.result for m in products if m and m.value("rows") is rows), None)


def _width(rows: Value) -> int:
    """Return the size of the new axis of the experts' first matrices."""
    for node in (user for user in rows.users if user.op.is_product):
        for axis in node.result.type:
            if axis.name not in rows.type and isinstance(axis.size, int):
                return axis.size
    return 0


def _shared(combine: Node) -> tuple[int, bool]:
    """Return the width of the expert that is added to the combined ones, and whether it is gated.

    What the residual adds is itself a sum, or the embedding, and never a product.
    """
    for add in (user for user in combine.result.users if user.op.is_sum):
        for operand in add.operands:
            node = operand.node
            if node is None or node is combine:
                continue
            if node.op.is_product:
                return _inner(node), False
            if node.op.is_scaling:
                return _gated(node)
    return 0, False


def _gated(scaling: Node) -> tuple[int, bool]:
    """Return the width of the product that a node scales, and whether a sigmoid is the factor."""
    parts = [v.node for v in scaling.operands if v.node is not None]
    widths = [_inner(n) for n in parts if n.op.is_product]
    return max(widths, default=0), any(n.op.name == "sigmoid" for n in parts)


def _inner(down: Node) -> int:
    sizes: Mapping[str, object] = {a.name: a.size for a in down.operands[0].type}
    size = sizes.get(ProductOp.of_node(down).over[0])
    return size if isinstance(size, int) else 0


def rows_of(operands: Iterable[Value]) -> Value | None:
    """Return the operand that is the rows of experts, or None."""
    return next((v for v in operands if "slot" in v.type and v.type.extents), None)


def rows_per_token(rows: Value) -> float:
    """Return the rows that experts compute for a token, those that hold none of it included.

    Under a capacity these are the slots of all experts over the tokens; otherwise the choices.

    Args:
      rows: a value between ``dispatch`` and ``combine``.
    """
    node = assigner(setter_of(rows.type.extents[0]))
    attrs = SlotsOp.of_node(node)
    if attrs.slots == "ragged":
        return _choices(rows)
    factor = attrs.capacity_factor
    bound = factor * _choices(rows) if attrs.convention == "assignments" else factor
    return min(bound, float(attrs.experts))


def choices_per_token(rows: Value) -> float:
    """Return the experts that a token asks for, whether or not a capacity drops some."""
    # Where experts choose, a token has as many choices as experts, and few are taken.
    if assigner(setter_of(rows.type.extents[0])).op.chooses:
        return rows_per_token(rows)
    return _choices(rows)


def choices_kept(rows: Value) -> float:
    """Return the experts that a token meets at most, in the mean: its choices, or fewer slots."""
    return min(choices_per_token(rows), rows_per_token(rows))


def _choices(rows: Value) -> int:
    slots = setter_of(rows.type.extents[0])
    tokens = SlotsOp.of_node(assigner(slots)).tokens
    return prod(a.size for a in slots.type if a.name not in tokens and isinstance(a.size, int))
