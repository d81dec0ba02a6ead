"""A routed layer whose number of experts changes: its parts, and the layer built of them anew."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import ceil, floor
from typing import Literal

from moecc.errors import Problem, raise_problems
from moecc.ir.builder import Builder
from moecc.ir.conventions import convention
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.moe import groups_of
from moecc.ir.ops.routing import RouteOp
from moecc.ir.structure import weight_of
from moecc.rewrite.passes import NO_STATISTICS, Context
from moecc.support.lazy import np
from moecc.support.text import exponential_text
from moecc.types import F32, Axis, Doubles, TensorType
from moecc.weights.arithmetic import STATISTICS, Add, Scale, name_in, scaled
from moecc.weights.expr import Expr, Full, Source
from moecc.weights.movement import Concat, Index, Stack
from moecc.weights.simplify import simplify
from moecc_passes.routed import RoutedLayer, routed_layers

EXPERT = "expert"


@dataclass(frozen=True)
class Anatomy:
    """A routed layer that can be built anew with other experts.

    Attributes:
      layer: the layer.
      route: the node that chooses experts.
      routing: the nodes from the router's product to the slots, ``dispatch`` included, in order.
      body: the nodes of the experts, in order.
      params: the parameters with an axis of experts.
    """

    layer: RoutedLayer
    route: Node
    routing: tuple[Node, ...]
    body: tuple[Node, ...]
    params: tuple[Value, ...]

    @property
    def attrs(self) -> RouteOp:
        """The attributes of the choice."""
        return RouteOp.of_node(self.route)

    @property
    def experts(self) -> int:
        """The number of experts."""
        return self.layer.assignment.experts

    @property
    def drops(self) -> bool:
        """Whether some choices get no slot: beyond a capacity, or by a mask of kept choices."""
        return self.layer.assignment.slots != "ragged" or "keep" in self.layer.given()

    @property
    def name(self) -> str:
        """Its location."""
        return self.layer.name

    @property
    def x(self) -> Value:
        """The tokens, ``[*tokens, embed]``."""
        return self.layer.dispatch.operands[0]

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All nodes, in order."""
        return (*self.routing, *self.body, self.layer.combine)

    @property
    def router(self) -> Value:
        """The router's matrix."""
        return next(p for p in self.params if p in self.routing[0].operands)

    @property
    def bias_of_choice(self) -> Value | None:
        """The bias that takes part in the choice alone, if there is one."""
        return next(iter(self.route.operands[1:]), None)

    @property
    def bias_of_logits(self) -> Value | None:
        """A parameter that is added to the router's product, if there is one."""
        added = {v for node in self.routing if node.op.is_sum for v in node.operands}
        return next((param for param in self.params if param in added), None)

    def bias_factor(self, times: float) -> float:
        """Return what a bias of the choice is multiplied by where there are `times` the experts.

        It is added to scores: probabilities become smaller with more experts, sigmoids do not.
        """
        return 1 / times if convention(self.attrs.gates).score == "softmax" else 1.0

    def is_last(self, param: Value) -> bool:
        """Whether a parameter is the experts' last matrix, or is added after it."""
        last = self.layer.last_matrix
        if last is None or param.users.keys().isdisjoint(self.body):
            return False
        users = [node for node in self.body if node in param.users]
        return all(self.body.index(node) >= self.body.index(last) for node in users)


def members(param: Value) -> list[Expr]:
    """Return the weight of each expert, simplified: those of copies are equal."""
    weight = weight_of(param)
    count = param.type[EXPERT].size
    assert isinstance(count, int), "experts are counted"
    return [simplify(Index(weight, EXPERT, at)) for at in range(count)]


def anatomies(graph: Graph) -> list[Anatomy]:
    """Return the routed layers of `graph`, in order.

    Raises:
      InputError: one cannot be built anew; all of them at once.
    """
    layers = [of_layer(layer) for layer in routed_layers(graph)]
    problems = [layer for layer in layers if isinstance(layer, Problem)]
    raise_problems(problems)
    return [layer for layer in layers if isinstance(layer, Anatomy)]


def of_layer(layer: RoutedLayer) -> Anatomy | Problem:
    """Return the parts of a layer, or why it cannot be built anew."""
    route, router = layer.route, layer.router
    if route is None or router is None or layer.scorer is not route or not route.op.routes:
        message = "only experts that a token chooses by a router can be changed"
        return Problem(message, layer.name, hint="prototypes, a hash, soft mixtures are left")
    nodes = list(_between(router, layer.combine))
    inside = {*nodes, layer.combine}
    read = [v for node in nodes for v in node.results if not v.users.keys() <= inside]
    if read:
        return Problem(
            "its routing is read elsewhere, too",
            layer.name,
            found=f"%{read[0].name}",
            hint="run this pass before add-losses or specialize; st-moe{losses=false} adds none",
        )
    if layer.gates is not route.results[1]:
        return Problem(
            "its gates are computed further after the choice, so their sum is unknown",
            layer.name,
            expected=f"%{route.results[1].name}, as the choice makes them",
            found=f"%{layer.gates.name}",
        )
    if any(not bias.is_param for bias in route.operands[1:]):
        groups, open_groups = groups_of(route)
        return Problem(
            "its tokens choose experts in some groups alone, which are of one size",
            layer.name,
            expected="a choice among all experts",
            found=f"in {open_groups} of {groups} groups",
        )
    at = nodes.index(layer.dispatch)
    operands = dict.fromkeys(v for node in nodes for v in node.operands if v.is_param)
    params = tuple(v for v in operands if EXPERT in v.type)
    return Anatomy(layer, route, tuple(nodes[: at + 1]), tuple(nodes[at + 1 :]), params)


def _between(first: Node, last: Node) -> Iterator[Node]:
    """Yield `first` and the nodes before `last` that depend on it, in order.

    Functions of the experts' parameters alone, as activations have them, are among them.
    """
    values = set(first.results)
    yield first
    node = first._next
    while node is not None and node is not last:
        is_of_params = all(EXPERT in v.type and v.is_param for v in node.operands)
        if not values.isdisjoint(node.operands) or (node.operands and is_of_params):
            values.update(node.results)
            yield node
        node = node._next


# Experts that no token goes to at first, because a bias keeps them from being chosen.
#
# The bias is one of the choice (DeepSeek-V3, arXiv 2412.19437, section 2.1.2), which balancing
# without a loss raises until they are chosen, or one of the logits.

BiasChoice = Literal["auto", "choice", "logits"]
"""Which bias a user wants."""

BIAS_DOC = (
    "the bias that keeps them from being chosen: of the choice, or of the logits (gpt_oss); auto: "
    "that of the layer, else of the choice where gates are made of the chosen alone"
)

NO_LOGIT = -1e4
"""Far below any logit; finite, since 0 times infinity is none."""
MARGIN = 2.0
"""Scores are between 0 and 1."""


@dataclass(frozen=True)
class Dormant:
    """Which of the new experts no token goes to.

    Attributes:
      numbers: theirs, among the new experts.
      param: the bias that keeps them.
      value: what their elements of it are.
      zero: whether they add nothing, should they be chosen one day.
    """

    numbers: Collection[int]
    param: Value
    value: float
    zero: bool

    def changed(self, param: Value, is_last: bool, parts: list[Expr]) -> list[Expr]:
        """Return the weights of the new experts in a parameter, with those of the dormant ones."""
        if param is not self.param and not (self.zero and is_last):
            return parts
        value = self.value if param is self.param else 0.0
        return [
            Full(value, part.type) if number in self.numbers else part
            for number, part in enumerate(parts)
        ]


def bias_kind(layer: Anatomy, wanted: BiasChoice) -> BiasChoice:
    """Return which bias keeps experts of a layer from being chosen: one that it has, if any.

    Where gates are no function of the chosen experts alone, a bias of the choice would let the
    others take a share.
    """
    row = convention(layer.attrs.gates)
    if wanted != "auto":
        return wanted
    if layer.bias_of_choice is not None:
        return "choice"
    if layer.bias_of_logits is not None:
        return "logits"
    return "choice" if row.score == "sigmoid" or row.renormalised else "logits"


def not_dormant(layer: Anatomy, wanted: BiasChoice) -> Iterator[Problem]:
    """Yield why a layer cannot have such experts."""
    row, slots = convention(layer.attrs.gates), layer.layer.assignment.slots
    if slots != "ragged":
        yield Problem(
            "a capacity shrinks with more experts, and drops other choices",
            layer.name,
            "slots=ragged",
            f"slots={slots}",
            "specialize{dropless=true} removes the capacity",
        )
    elif bias_kind(layer, wanted) == "logits":
        if layer.bias_of_choice is not None:
            yield Problem(
                "the layer has a bias of the choice, by which they could be chosen",
                layer.name,
                "bias=choice",
                "bias=logits",
            )
    elif not row.renormalised and row.score != "sigmoid":
        yield Problem(
            f"experts that are not chosen have a share of {row.name} gates",
            layer.name,
            hint="bias=logits keeps them from it"
            if layer.bias_of_choice is None
            else "a bias of the logits would keep them from it; this layer has one of the choice",
        )


def dormant_up_to(
    layer: Anatomy, ctx: Context, wanted: BiasChoice, count: int, are_copies: bool = True
) -> str:
    """Return up to what, and for which scores, `count` more experts of a low bias change nothing.

    It is a bound of a promise; empty where the scores are between 0 and 1, and biases are numbers.
    """
    row, bias = convention(layer.attrs.gates), layer.bias_of_choice
    if bias_kind(layer, wanted) == "choice":
        if bias is None or all(isinstance(weight, Full) for weight in members(bias)):
            return ""
        least = least_bias(bias, ctx)
        if least is None:
            return f"0 where biases of the choice are above {NO_LOGIT + MARGIN:,.0f}"
        return f"0 where biases of the choice are at least {least:g}, as they are"
    where = (
        f"where products of the router are below {-NO_LOGIT / 4:,.0f} in size, as its biases are"
    )
    if row.renormalised or row.score == "sigmoid" or not row.equal_for_equal_logits:
        return f"0 {where}"
    # Copies of experts have their logits, but for a bias that these have.
    nearer = 0.0 if are_copies and layer.bias_of_logits is None else -NO_LOGIT / 2
    return (
        f"{exponential_text(NO_LOGIT + nearer, ceil(count / layer.experts))} of each gate {where}"
    )


def least_bias(bias: Value, ctx: Context) -> int | None:
    """Return a whole number that no element of a bias is below, or None if it is not read."""
    values = ctx.read(bias.weight or Source(bias.name, bias.type))
    return None if values is None else floor(min(0.0, float(values.min())))


def with_bias(
    graph: Graph, layer: Anatomy, ctx: Context, wanted: BiasChoice
) -> tuple[Anatomy, Value, float]:
    """Return a layer with its bias, added as zeros where it had none, and a value that is too low.

    Args:
      graph: the graph, changed in place.
      layer: the layer.
      ctx: reads a bias that is there.
      wanted: which bias.
    """
    is_logit = bias_kind(layer, wanted) == "logits"
    bias = layer.bias_of_logits if is_logit else layer.bias_of_choice
    value = NO_LOGIT if is_logit else -MARGIN
    if bias is not None:
        if not is_logit:
            # Below all elements of the bias, which are added to scores, where they can be read.
            least = least_bias(bias, ctx)
            value = NO_LOGIT if least is None else least - MARGIN
        return layer, bias, value
    axis, route = layer.router.type[EXPERT], layer.route
    bias = graph.param(
        graph.fresh(f"{layer.router.name.removesuffix('.weight')}.bias"),
        layer.router.type.with_axes([axis]),
        Full(0.0, TensorType(F32, (axis,))),
        loc=layer.name,
    )
    builder = Builder(graph, loc=route.loc, origin="resize", before=route)
    if is_logit:
        rerouted = builder.clone(route, builder.add(route.operands[0], bias), *route.operands[1:])
    else:
        rerouted = builder.clone(route, *route.operands, bias, using=("bias",))
    for before, after in zip(route.results, rerouted.results, strict=True):
        before.replace_by(after)
    route.erase()
    changed = of_layer(replace(layer.layer, route=rerouted))
    assert isinstance(changed, Anatomy), "it could be built anew before"
    return changed, bias, value


# Builds a routed layer anew: with other experts, or as one dense block.

Regroup = Callable[[list[Expr]], list[Expr]]
"""From the weights of the experts to those of the new experts."""


def mean(weights: Sequence[Expr]) -> Expr:
    """Return the mean of several weights; of equal ones, the very one."""
    if len(set(weights)) == 1:
        return weights[0]
    return Scale(reduce(Add, weights), 1 / len(weights))


def resize(
    graph: Graph,
    part: Anatomy,
    regroup: Regroup,
    top_k: int,
    factor: float = 1.0,
    bias_factor: float = 1.0,
    dormant: Dormant | None = None,
) -> None:
    """Replace the experts of a layer.

    Args:
      graph: the graph, changed in place.
      part: the layer.
      regroup: makes the weights of the new experts, and the rows of the router.
      top_k: the experts that a token goes to.
      factor: what the experts' last matrix and a bias after it are multiplied by.
      bias_factor: what a bias that takes part in the choice alone is multiplied by.
      dormant: which of the new experts no token goes to.
    """
    image: dict[Value, Value] = {}
    for param in part.params:
        before = members(param)
        parts = regroup(before)
        if part.is_last(param):
            parts = [scaled(weight, factor) for weight in parts]
        elif param in part.route.operands:
            parts = [scaled(weight, bias_factor) for weight in parts]
        if dormant is not None:
            parts = dormant.changed(param, part.is_last(param), parts)
        count = len(parts)
        axes = [Axis(a.name, count if a.name == EXPERT else a.size) for a in param.type]
        at = param.type.names.index(EXPERT)
        weight: Expr = Stack(tuple(parts), EXPERT, at)
        if before == parts[:-1]:
            # The prover sees that the experts before an appended one are those that they were.
            weight = Concat(
                (Stack(tuple(before), EXPERT, at), Stack((parts[-1],), EXPERT, at)), EXPERT
            )
        image[param] = _replacement(graph, param, axes, weight)
    attrs: dict[Node, dict[str, object]] = {
        part.route: {"top_k": top_k},
        part.layer.assigner: {"experts": count},
    }
    for node in part.nodes:
        into = node.attrs.get("into")
        if isinstance(into, tuple):
            # The attribute names the axes that the node makes.
            sizes = tuple((name, count if name == EXPERT else size) for name, size in into)
            attrs.setdefault(node, {"into": sizes})
    _take_place(graph, part, part.nodes, part.layer.combine.result, image, attrs)


def make_dense(graph: Graph, part: Anatomy, weight_of: Callable[[Value, bool], Expr]) -> None:
    """Replace a layer by its experts' operations on every token.

    Args:
      graph: the graph, changed in place.
      part: the layer.
      weight_of: makes the weight of the dense parameter from that of the experts, and from whether
        it is the last matrix or after it.
    """
    rows = part.layer.dispatch.result
    image = {rows: part.x}
    for param in part.params:
        if param.users.keys().isdisjoint(part.body):
            continue
        weight = weight_of(param, part.is_last(param))
        image[param] = _replacement(graph, param, list(weight.type), weight)
    _take_place(graph, part, part.body, part.layer.combine.operands[0], image, {})


def _replacement(graph: Graph, param: Value, axes: Sequence[Axis], weight: Expr) -> Value:
    """Add a parameter under the name of `param`, which gets another one."""
    name = param.name
    graph.rename(param, graph.fresh(f"{name}.old"))
    return graph.param(name, param.type.with_axes(list(axes)), weight, loc=param.loc)


def _take_place(
    graph: Graph,
    part: Anatomy,
    nodes: Sequence[Node],
    output: Value,
    image: dict[Value, Value],
    attrs: Mapping[Node, Mapping[str, object]],
) -> None:
    """Emit `nodes` again on the images of their operands; `output` replaces that of the layer."""
    combine = part.layer.combine
    for node in nodes:
        changed = {**node.attrs, **attrs.get(node, {})}
        graph.copy(node, image, changed, origin="resize", before=combine)
    combine.result.replace_by(image[output])
    for node in reversed(part.nodes):
        node.erase()
    for param in part.params:
        if not param.users:
            graph.erase_param(param.name)


# Numbers of experts, as options list them.


def expert_numbers(text: str) -> tuple[int, ...] | Problem:
    """Return the numbers in ``0,2,5``, in ascending order; none in an empty text."""
    words = text.split(",") if text else []
    if not all(word.isascii() and word.isdigit() and len(word) < 7 for word in words):
        return Problem("not numbers of experts", "experts", "0,2,5", text)
    numbers = tuple(int(word) for word in words)
    if list(numbers) != sorted(set(numbers)):
        return Problem("not in ascending order without repetition", "experts", "0,2,5", text)
    return numbers


# Which experts stay, and which become one, by statistics of the model.


def statistic(layer: Anatomy, name: str, ctx: Context) -> Doubles | None:
    """Return a statistic of the experts of a layer, ``[expert, …]``; None on reduced sizes."""
    axes = [Axis(EXPERT, layer.experts)]
    if name == "experts.result":
        axes.append(Axis("embed", _embed(layer)))
    type = TensorType(F32, tuple(axes))
    values = ctx.read(Source(name_in(STATISTICS, f"{layer.name}.{name}"), type))
    return None if values is None else values.astype(np.float64)


def unread(layer: Anatomy, name: str, ctx: Context) -> Iterator[Problem]:
    """Yield why a statistic of a layer cannot be read."""
    if ctx.statistics is None:
        yield NO_STATISTICS
        return
    shape = (layer.experts, _embed(layer)) if name == "experts.result" else (layer.experts,)
    problem = ctx.statistics.problem(layer.name, {name: shape})
    if problem is not None:
        yield problem


def _embed(layer: Anatomy) -> int:
    result = layer.layer.combine.result.type
    (embed,) = (a for a in result if a.name not in layer.layer.tokens)
    return embed.fixed_size


def largest(values: Doubles, count: int) -> tuple[int, ...]:
    """Return the numbers of the largest values, in ascending order; of equal ones the first."""
    return tuple(sorted(np.argsort(-values, kind="stable")[:count].tolist()))


def shared_out(values: Sequence[Doubles], least: Sequence[int], total: int) -> tuple[int, ...]:
    """Return the number of experts that each layer keeps of a budget for all layers.

    Each layer keeps its `least` first.  The others follow by their part in the sum of their layer,
    since results grow along the residual stream; of equal parts the first layer's.

    Args:
      values: the importance of the experts of each layer.
      least: the least number of each layer.
      total: the number of all.
    """
    parts = [np.sort(layer)[::-1] / max(layer.sum(), np.finfo(float).tiny) for layer in values]
    candidates = [
        (-part, at)
        for at, (layer, count) in enumerate(zip(parts, least, strict=True))
        for part in layer[count:].tolist()
    ]
    counts = list(least)
    for _, at in sorted(candidates)[: total - sum(least)]:
        counts[at] += 1
    return tuple(counts)


def alike(results: Doubles, size: int) -> list[tuple[int, ...]]:
    """Return groups of `size` experts whose mean results are near each other, in order.

    The nearest two of those left begin a group, and the nearest to its mean join it.

    Args:
      results: the mean result of each expert, ``[expert, embed]``; `size` divides their number.
      size: the experts of a group.
    """
    left = list(range(len(results)))
    groups = []
    while left:
        group = _nearest_pair(results, left) if len(left) > 1 else list(left)
        while len(group) < size:
            mean = results[group].mean(0)
            ungrouped = [number for number in left if number not in group]
            group.append(min(ungrouped, key=lambda n: float(np.sum((results[n] - mean) ** 2))))
        groups.append(tuple(sorted(group)))
        left = [number for number in left if number not in group]
    return sorted(groups)


def _nearest_pair(results: Doubles, left: list[int]) -> list[int]:
    some = results[left]
    far = ((some[:, None] - some[None]) ** 2).sum(2)
    far[np.tril_indices(len(left))] = np.inf
    first, second = np.unravel_index(int(np.argmin(far)), far.shape)
    return [left[int(first)], left[int(second)]]
