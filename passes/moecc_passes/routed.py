"""The routed layers of a graph, for passes on routing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moecc.errors import InputError
from moecc.ir.graph import Graph, Node, Value, where
from moecc.ir.ops.slots import SlotsOp, operands_by_word
from moecc.ir.routing_losses import Routed, Scores
from moecc.ir.traits import RowMove
from moecc.rewrite.pattern import NearMiss, P, Pattern, fits

# The anatomy of a routed layer: router, scorer, slots, dispatch, experts, combine.  The scorer
# reads the router's logits, behind noise or the cut into prototypes; slots are given to what it
# chose, behind prototypes put together.
PRODUCT = P.contract(P.any(), P.any())
AFTER_ROUTER = P.split(P.any()) | P.add(P.any(), P.any())
SCORER = P.route(P.any(), ...) | P.softmax(P.any())
AFTER_SCORER = P.merge(P.any()) | P.add(P.any(), P.any())
AFTER_PRODUCT = P.add(P.any(), P.any()) | P.scale(P.any())
NOISY = P.add(P.any("clean"), P.random_normal(P.any(), P.any(), std=P.attr("std")))
ATTENTION = P.softmax(P.any(), axis=P.attr("axis"))
SUMMED = P.contract(P.any(), P.any(), over=P.attr("over"))
MASKED = P.mask(P.any(), P.any("seen"))
CAUSAL = P.causal(P.any(), ...)

CAUSAL_INPUTS = "causal_inputs"
"""The attribute of a graph that is a part of a decoder: its inputs that depend on attention."""


@dataclass(frozen=True)
class RoutedLayer:
    """One mixture of experts.

    Attributes:
      assigner: the node that assigns slots: ``assign_slots`` or ``expert_choice``.
      route: the node that chooses experts, or None if it is not ``route``.
      combine: the node that combines the experts' rows.
      dispatch: the node that moves tokens to the experts.
      name: its location; with a number if a location has several.
    """

    assigner: Node
    route: Node | None
    combine: Node
    dispatch: Node
    name: str

    @property
    def slots(self) -> Value:
        """The slots."""
        return self.assigner.results[-1]

    @property
    def gates(self) -> Value:
        """The weights of the rows, by choice.

        Raises:
          InputError: rows are combined as they are, and no gates were dispatched to weight them.
        """
        *_, last = self.combine.operands
        if last is not self.slots:
            return last
        sent = self.gate_dispatch
        if sent is None:
            raise InputError(
                "a routed layer has no gates",
                where=where(self.combine),
                expected="combine, or rows weighted by what dispatch_gates makes",
                found=str(self.combine.op),
            )
        return sent.operands[0]

    @property
    def gate_dispatch(self) -> Node | None:
        """The node that sends the gates with the rows; None where none does."""
        return _mover(self.slots, RowMove.GATES_TO_SLOTS)

    @property
    def experts(self) -> Value:
        """The chosen experts."""
        return self.combine.operands[1]

    @property
    def assignment(self) -> SlotsOp:
        """The attributes of the slot assignment."""
        return SlotsOp.of_node(self.assigner)

    @property
    def tokens(self) -> tuple[str, ...]:
        """The token axes, outermost first."""
        return self.assignment.tokens

    @property
    def top_k(self) -> int:
        """The choices of a token."""
        (size,) = (a.size for a in self.slots.type if a.name not in self.tokens)
        assert isinstance(size, int), "the number of choices is known"
        return size

    @property
    def choice(self) -> str:
        """The name of the axis of choices."""
        (name,) = (n for n in self.slots.type.names if n not in self.tokens)
        return name

    @property
    def last_matrix(self) -> Node | None:
        """The experts' last contraction, before an output bias; None if it was not found."""
        value = self.combine.operands[0]
        while product := fits(AFTER_PRODUCT, value.node):
            value = product.root.operands[0]
        return value.node if fits(PRODUCT, value.node) else None

    @property
    def scorer(self) -> Node | None:
        """The node that reads the router's logits; None if nothing is scored, as with a hash."""
        return _first_ancestor(self.assigner.operands[0], SCORER, AFTER_SCORER)

    @property
    def router(self) -> Node | None:
        """The product of tokens with the router's weight; None if there is none."""
        if self.scorer is None:
            return None
        return _first_ancestor(self.scorer.operands[0], PRODUCT, AFTER_ROUTER)

    @property
    def experts_choose(self) -> bool:
        """Whether experts choose tokens; otherwise tokens choose experts."""
        return self.assigner.op.chooses

    def given(self) -> dict[str, Value]:
        """The operands of the slot assignment besides the experts, by word."""
        return operands_by_word(self.assigner.operands, self.assigner.attrs)

    def routed(self) -> Routed:
        """Return the routing as losses and metrics read it."""
        return Routed(self.experts, self.gates, self.slots, self._scores())

    def _scores(self) -> Scores | None:
        if self.scorer is None:
            return None
        logits = self.scorer.operands[0]
        chosen = self.scorer.results[0] if self.scorer.op.chooses else None
        return Scores(logits, chosen, *_clean(logits))


def routed_layers(graph: Graph) -> list[RoutedLayer]:
    """Return the routed layers of `graph`, in order, except those without a ``combine``.

    Raises:
      InputError: some are in the body of a scan, where they cannot be distinguished.
    """
    layers: list[RoutedLayer] = []
    names: dict[str, int] = {}
    for node in graph:
        if node.body is not None and any(n.op.assigns_slots for n in node.body):
            raise InputError(
                "layers of experts are rolled up in a scan",
                where=where(node),
                hint="run this pass before roll-layers, or unroll-layers before it",
            )
        if not node.op.assigns_slots:
            continue
        moves = (RowMove.TO_TOKENS, RowMove.TO_SLOTS)
        combine, dispatch = (_mover(node.results[-1], way) for way in moves)
        if combine is None or dispatch is None:
            continue
        base = node.loc or "layer"
        names[base] = names.get(base, 0) + 1
        name = base if names[base] == 1 else f"{base}.{names[base]}"
        layers.append(RoutedLayer(node, _route_of(node), combine, dispatch, name))
    return layers


NOTHING_ROUTED = NearMiss(
    "routed layers",
    "the graph",
    "no layer has experts that are chosen; st-moe or upcycle makes some so",
)
"""The near miss of a pass on routed layers that found none."""


def _mover(slots: Value, way: RowMove) -> Node | None:
    return next((n for n in slots.users if n.op.moves is way), None)


def _route_of(assigner: Node) -> Node | None:
    node = assigner.operands[0].node
    return node if node is not None and node.op.chooses else None


def _first_ancestor(value: Value, wanted: Pattern, through: Pattern) -> Node | None:
    """Return the nearest node matching `wanted` that `value` depends on via `through` nodes."""
    values = [value]
    for candidate in values:
        if fits(wanted, candidate.node):
            return candidate.node
        if intermediate := fits(through, candidate.node):
            values += intermediate.root.operands
    return None


def _clean(logits: Value) -> tuple[Value | None, float]:
    """Return the logits without added noise, and its standard deviation."""
    noisy = fits(NOISY, logits.node)
    return (noisy.value("clean"), noisy.attr("std")) if noisy else (None, 0.0)


def attention_scores(graph: Graph) -> list[Node]:
    """Return the softmax of the scores of every attention: its result weighs a sum along its axis.

    Raises:
      InputError: some are in the body of a scan.
    """
    scores = []
    for node in graph:
        if node.body is not None and any(_is_attention(inner) for inner in node.body):
            raise InputError(
                "layers of attention are rolled up in a scan",
                where=where(node),
                hint="run this pass before roll-layers, or unroll-layers before it",
            )
        if _is_attention(node):
            scores.append(node)
    return scores


def _is_attention(node: Node) -> bool:
    softmax = fits(ATTENTION, node)
    if softmax is None or "attention" not in node.loc.rpartition(".")[2]:
        return False
    uses = (fits(SUMMED, user) for user in node.result.users)
    return any(use is not None and softmax.attr("axis") in use.attr("over") for use in uses)


def causal_values(graph: Graph) -> set[Value]:
    """Return the values that depend on attention under a causal mask.

    A layer that reads such a value belongs to a decoder: its effect on a token must not depend on
    later ones.  A graph without the attention names the inputs that do.
    """
    named = graph.attrs.get(CAUSAL_INPUTS) or ()
    causal = {graph.inputs[name] for name in named if name in graph.inputs}
    for node in graph:
        if any(v in causal for v in node.operands) or _masks_causally(node):
            causal.update(node.results)
    return causal


def _masks_causally(node: Node) -> bool:
    masked = fits(MASKED, node)
    return masked is not None and any(fits(CAUSAL, n) for n in _ancestors(masked.value("seen"), 3))


def _ancestors(value: Value, steps: int) -> Iterator[Node]:
    """Yield the nodes that `value` is computed by, up to `steps` of them in a row."""
    values = [value]
    for _ in range(steps):
        nodes = [v.node for v in values if v.node is not None]
        yield from nodes
        values = [v for n in nodes for v in n.operands]
