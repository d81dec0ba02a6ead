"""The routed layers of a graph, and passes that weight their rows and return what they do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated

from moecc.analysis import find_ffn_blocks, hides_later
from moecc.errors import InputError, Problem
from moecc.ir.builder import Builder
from moecc.ir.conventions import TRACE, VALUES
from moecc.ir.graph import Graph, Node, Value, where
from moecc.ir.ops.slots import SlotsOp, operands_by_word
from moecc.ir.structure import replace_value
from moecc.ir.traits import RowMove
from moecc.rewrite.passes import EXACT, Bounds, Context, Pass, PassResult, Preserves
from moecc.rewrite.pattern import NearMiss, P, Pattern, fits
from moecc.types import PRED, TensorType

if TYPE_CHECKING:
    from moecc.ir.routing_losses import Routed, Scores

# The anatomy of a routed layer: router, scorer, slots, dispatch, experts, combine.  The scorer
# reads the router's logits, behind noise or the cut into prototypes; slots are given to what it
# chose, behind prototypes put together.
PRODUCT = P.contract(P.any(), P.any())
AFTER_ROUTER = P.split(P.any()) | P.add(P.any(), P.any())
SCORER = P.route(P.any(), ...) | P.softmax(P.any())
AFTER_SCORER = P.merge(P.any()) | P.add(P.any(), P.any())
AFTER_PRODUCT = P.add(P.any(), P.any()) | P.scale(P.any())
NOISY = P.add(P.any("clean"), P.random_normal(P.any(), P.any(), std=P.attr("std")))
MASKED = P.mask(P.any(), P.any("seen"))

_STEPS_TO_PRODUCT = 4
"""How many nodes, those of dropout, may be between attention weights and their product."""

FACTOR = Bounds(0, is_open=True, hint="ST-MoE: 1.25 in training, 2.0 at evaluation")
"""The bounds of capacity factors."""

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
        return self.slots.type[self.choice].fixed_size

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
        from moecc.ir.routing_losses import Routed

        return Routed(self.experts, self.gates, self.slots, self._scores())

    def _scores(self) -> Scores | None:
        if self.scorer is None:
            return None
        from moecc.ir.routing_losses import Scores

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


def require_no_outputs(
    graph: Graph, prefixes: str | tuple[str, ...], fault: str, hint: str | None = None
) -> None:
    """Raise InputError with `fault` if an output has a name with one of `prefixes`."""
    present = [name for name in graph.output_names if name.startswith(prefixes)]
    if present:
        raise InputError(fault, found=", ".join(present[:5]), hint=hint)


NO_ATTENTION = NearMiss("attention", "the graph", "no tokens attend to others")
"""What passes over attention report of a graph without it."""

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
    return "attention" in node.loc.rpartition(".")[2] and weighted_values(node) is not None


def weighted_values(softmax: Node) -> Value | None:
    """Return the values that a softmax weighs, of an attention; None for any other node.

    They vary over the batch as the weights do, which matrices of experts do not.
    """
    if not softmax.op.is_distribution:
        return None
    axis, weights = str(softmax.attrs["axis"]), [softmax.result]
    for _ in range(_STEPS_TO_PRODUCT):
        uses = [(value, node) for value in weights for node in value.users]
        for value, node in uses:
            if node.op.is_product and axis not in node.result.type:
                values = next((v for v in node.operands if v is not value), value)
                varies = {axis, softmax.result.type.names[0]} <= set(values.type.names)
                return values if varies else None
        weights = [v for _, n in uses if n.op.elementwise for v in n.results if axis in v.type]
    return None


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
    return masked is not None and any(hides_later(n) for n in _ancestors(masked.value("seen")))


def _ancestors(value: Value) -> Iterator[Node]:
    """Yield the nodes that `value` is computed by, up to three of them in a row."""
    values = [value]
    for _ in range(3):
        nodes = [v.node for v in values if v.node is not None]
        yield from nodes
        values = [v for n in nodes for v in n.operands]


# The inputs that belong to a graph's tokens: their ids and their padding mask.


def is_decoder(loc: str) -> bool:
    """Return whether `loc` is a location in the decoder of an encoder-decoder."""
    return loc == "decoder" or loc.startswith("decoder.")


def token_ids(graph: Graph, like: TensorType, tokens: Sequence[str], loc: str) -> Value | None:
    """Return the input that holds the ids of the tokens of a layer, or None.

    Args:
      graph: the graph.
      like: the type of a value of the layer.
      tokens: the axes of `like` that number tokens.
      loc: the location of the layer: two stacks may have sequences of one length.
    """
    fitting = [
        v
        for v in graph.inputs.values()
        if v.type.dtype.kind == "int" and _same_tokens(v.type, like, tokens)
    ]
    mine = [v for v in fitting if v.name.startswith("decoder") == is_decoder(loc)]
    return next(iter(mine or fitting), None)


def mask_name(loc: str) -> str:
    """Return the name of the input that is true for tokens and false for padding."""
    return "decoder_mask" if is_decoder(loc) else "mask"


def mask_misfit(graph: Graph, like: TensorType, tokens: Sequence[str], loc: str) -> Problem | None:
    """Return why an input with the name of a layer's padding mask is not one, or None."""
    there = graph.inputs.get(mask_name(loc))
    if there is None or (there.type.dtype == PRED and _same_tokens(there.type, like, tokens)):
        return None
    wanted = TensorType(PRED, tuple(like[n] for n in tokens))
    return Problem(f"%{there.name} is not a padding mask", loc, str(wanted), str(there.type))


def padding_mask(graph: Graph, like: TensorType, tokens: Sequence[str], loc: str) -> Value:
    """Return the padding mask of a layer, an input that is added if it is missing.

    Args:
      graph: the graph, for which `mask_misfit` returns None.
      like: the type of a value of the layer.
      tokens: the axes of `like` that number tokens.
      loc: the location of the layer.
    """
    name = mask_name(loc)
    if name in graph.inputs:
        return graph.inputs[name]
    return graph.input(name, TensorType(PRED, tuple(like[n] for n in tokens)))


def _same_tokens(type: TensorType, like: TensorType, tokens: Sequence[str]) -> bool:
    return set(type.names) == set(tokens) and all(type[n].size == like[n].size for n in tokens)


# The pass ``weight-rows``: rows are weighted at their experts, before the last product.

NAME = "weight-rows"


@dataclass(frozen=True)
class WeightRowsPass(Pass):
    """Send gates with the rows, and weight each row before the last product of its expert.

    The gradient of a gate is the product of a row that its expert made with the gradient of its
    token.  Where rows are weighted at their tokens, a backward pass that did not keep them makes
    them again, and brings them back from other devices once more.  Weighted before the last
    product, which is linear, the gradient of a gate comes of what the product reads and of its own
    gradient: nothing is made again, and a number a row returns.  Where something follows the last
    product, a bias say, what follows is weighted.

    Before::

        %y = contract %m, %down {over=mlp} : f32[group=1, expert=8, slot=…, embed=16]
        %c = combine %y, %e, %s, %g : f32[batch=B, seq=S, embed=16]

    After::

        %w = dispatch_gates %g, %e, %s : f32[group=1, expert=8, slot=…]
        %m1 = weight_rows %m, %w : f32[group=1, expert=8, slot=…, mlp=32]
        %y = contract %m1, %down {over=mlp} : f32[group=1, expert=8, slot=…, embed=16]
        %c = combine_weighted %y, %e, %s : f32[batch=B, seq=S, embed=16]
    """

    name = NAME
    summary = "weight rows at their experts, before the last product"
    must_match = True
    preserves = Preserves("reassociation", "rows are weighted before their last product")

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Weight the rows of every routed layer that has not."""
        layers = [y for y in routed_layers(graph) if y.gates is y.combine.operands[-1]]
        for layer in layers:
            _weight(layer, Builder(graph, loc=layer.combine.loc, origin=NAME))
        missing = [] if layers else [NOTHING_ROUTED]
        stats = {"layers": len(layers)}
        return PassResult(bool(layers), len(layers), stats, near_misses=missing)


def _weight(layer: RoutedLayer, builder: Builder) -> None:
    combine = layer.combine
    rows, experts, slots, gates = combine.operands
    last, number = _read_by_last_product(rows, combine) or (combine, 0)
    builder.before = combine
    row_gates = builder.dispatch_gates(gates, experts, slots)
    weighted = builder.weight_rows(last.operands[number], row_gates)
    rows_out = weighted if last is combine else _again(last, number, weighted, builder)
    together = builder.combine_weighted(rows_out, experts, slots, name=combine.result.name)
    replace_value(combine.result, together)
    combine.erase()
    if last is not combine:
        last.erase()


def _read_by_last_product(rows: Value, combine: Node) -> tuple[Node, int] | None:
    """Return the product that makes `rows` for `combine` alone, and which operand has rows."""
    node = rows.node
    if node is None or not node.op.is_product or set(rows.users) != {combine} or rows.is_output:
        return None
    axes = {"group", "expert", "slot"}
    numbers = [i for i, v in enumerate(node.operands) if axes <= set(v.type.names)]
    return (node, numbers[0]) if len(numbers) == 1 else None


def _again(product: Node, number: int, weighted: Value, builder: Builder) -> Value:
    """Return what `product` makes of weighted rows, in its place behind these."""
    operands = [weighted if i == number else v for i, v in enumerate(product.operands)]
    name = product.result.name
    again = builder.node(product.op.name, *operands, names=(name,), **product.attrs)
    again.loc, again.origin = product.loc, product.origin
    return again.result


# The pass ``trace-routing``: the routing of tokens as outputs.


@dataclass(frozen=True)
class TraceRoutingPass(Pass):
    """Return, for every routed layer, the chosen experts, their gates, slots and logits.

    Before::

        %p = assign_slots %e {tokens=(batch, seq), experts=8} : i32[…, choice=2] @layers.3.ffn
        output logits = %y

    After::

        output logits = %y
        output trace.layers.3.ffn.experts = %e
        output trace.layers.3.ffn.gates = %g
        output trace.layers.3.ffn.slots = %p     # −1: dropped
        output trace.layers.3.ffn.logits = %l    # where experts are chosen by route

    With the ids of the tokens this is the specialisation of ST-MoE, section 7.
    """

    name = "trace-routing"
    summary = "add the routing of each layer as outputs"
    must_match = True
    preserves = EXACT

    def validate_after(self, earlier: Sequence[Pass]) -> list[Problem]:
        """Return a problem if an earlier pass traces already."""
        if not any(isinstance(item, TraceRoutingPass) for item in earlier):
            return []
        return [Problem("a graph is traced once", hint="one trace-routing, after the conversion")]

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Add the outputs.

        Raises:
          InputError: the graph has such outputs already.
        """
        require_no_outputs(graph, TRACE, "the graph is traced already")
        layers = routed_layers(graph)
        for layer in layers:
            values = {"experts": layer.experts, "gates": layer.gates, "slots": layer.slots}
            if layer.route is not None:
                values["logits"] = layer.route.operands[0]
            for name, value in values.items():
                graph.set_output(f"{TRACE}{layer.name}.{name}", value)
        missing = [] if layers else [NOTHING_ROUTED]
        stats = {"layers": len(layers)}
        return PassResult(bool(layers), len(layers), stats, near_misses=missing)


# The pass ``trace-values``: what goes into blocks and experts, and comes out, as outputs.


@dataclass(frozen=True)
class TraceValuesPass(Pass):
    """Return the input and the hidden value of dense blocks, and each expert's result of tokens.

    Before::

        %m = mul %s, %u : f32[batch=B, seq=S, mlp=1536]           @layers.3.ffn
        output logits = %y

    After::

        output logits = %y
        output values.layers.3.ffn.input = %n
        output values.layers.3.ffn.hidden = %m

    A layer of experts has the outputs ``experts``, ``gates`` and, for each choice c, ``result.c``:
    what the expert of that choice made of the token, before it is multiplied by its gate.
    ``moecc capture`` takes statistics of them.
    """

    name = "trace-values"
    summary = "add the inputs and outputs of blocks and experts as outputs"
    must_match = True
    preserves = EXACT

    at: Annotated[str, "locations as a shell pattern: layers.3.*"] = "*"

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Add the outputs.

        Raises:
          InputError: the graph has such outputs already.
        """
        require_no_outputs(graph, VALUES, "values are traced already")
        values = dict(self._values(graph))
        for name, value in values.items():
            graph.set_output(f"{VALUES}{name}", value)
        layers = len({name.rpartition(".")[0] for name in values})
        missing = NearMiss(self.name, "the graph", f"no block or layer of experts is at {self.at}")
        return PassResult(
            bool(values), layers, {"values": len(values)}, near_misses=[] if values else [missing]
        )

    def _values(self, graph: Graph) -> Iterator[tuple[str, Value]]:
        for block in find_ffn_blocks(graph).blocks:
            if fnmatchcase(block.loc, self.at):
                yield f"{block.loc}.input", block.x
                yield f"{block.loc}.hidden", block.down.operands[0]
        for layer in routed_layers(graph):
            if fnmatchcase(layer.name, self.at) and not layer.experts_choose:
                yield f"{layer.name}.experts", layer.experts
                yield f"{layer.name}.gates", layer.gates
                for choice in range(layer.top_k):
                    yield f"{layer.name}.result.{choice}", _result(graph, layer, choice)


def _result(graph: Graph, layer: RoutedLayer, choice: int) -> Value:
    """Emit what the expert of one choice made of each token: the sum with a gate of 1 for it."""
    loc, node = layer.combine.loc, layer.combine
    b = Builder(graph, loc=loc, origin="trace-values", before=node)
    rows, experts, slots, gates = node.operands[:4]
    number = b.constant(value=float(choice), dtype="i32")
    places = b.positions(gates, axis=layer.choice)
    is_chosen = b.broadcast(b.equal(places, b.broadcast(number, places)), gates)
    ones = b.broadcast(b.constant(value=1.0, dtype=gates.type.dtype.name), gates)
    return b.combine(rows, experts, slots, b.mask(ones, is_chosen, fill=0.0))
