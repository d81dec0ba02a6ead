"""The work of a step, as a plan counts it: parameters, operations, sublayers and layers.

Sizes are global; a layout divides them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from math import prod

from moecc.analysis import is_trainable, split_head
from moecc.ir.attention import (
    AttentionFacts,
    AttentionKernel,
    AttentionProgram,
    are_written_out,
    facts_of,
)
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.ops.attention import AttentionOp
from moecc.ir.traits import Cost, RowMove

# Global shapes of values, each once, so that what a layout makes of one is worked out once.


@dataclass(frozen=True, eq=False)
class GlobalShape:
    """Axes with their global sizes; one object for equal shapes, which `ShapeOfAxes` sees to.

    The experts of a router's logits are called ``choices``: a device has all of a token's.
    """

    axes: tuple[tuple[str, float], ...]

    @cached_property
    def elements(self) -> float:
        """The number of elements, on all devices together."""
        return prod(size for _, size in self.axes)

    @cached_property
    def has_slots(self) -> bool:
        """Whether it is one of rows of experts."""
        return "slot" in self.names

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the axes."""
        return tuple(name for name, _ in self.axes)

    def __iter__(self) -> Iterator[tuple[str, float]]:
        return iter(self.axes)

    def size(self, name: str) -> float:
        """Return the size of an axis."""
        return dict(self.axes)[name]


Shapes = tuple[GlobalShape, ...]

ShapeOf = Callable[[Value], GlobalShape]
"""Returns the global shape of a value."""

ShapeOfAxes = Callable[[tuple[tuple[str, float], ...]], GlobalShape]
"""Returns the shape of axes, the same object for equal ones: ``cache(GlobalShape)``."""


# What a plan knows of an attention that is one operation: what decides its kernel, its scores.

FORWARD_AND_GRADIENT = 3.0
"""Passes of a training step that computes nothing again."""


@dataclass(frozen=True)
class PlannedAttention:
    """An attention, as a plan sees it.

    Attributes:
      facts: what decides its kernel, but for the program that it is in.
      scores: the shape of its scores, which are in no operand.
    """

    facts: AttentionFacts
    scores: GlobalShape


def attention_of(
    node: Node, size: Callable[[object], float], shape_of: ShapeOfAxes
) -> PlannedAttention | None:
    """Return what a plan knows of an attention; None of any other node.

    Args:
      node: the node.
      size: the size that the size of an axis stands for.
      shape_of: makes shapes.
    """
    if not node.op.attends:
        return None
    attrs = AttentionOp.of_node(node)
    query, key, value = (
        {a.name: int(size(a.size)) for a in v.type.axes} for v in node.operands[:3]
    )
    scores = {n: float(s) for n, s in (query | key).items() if n != attrs.over}
    # Of the program the machine decides, which is not known here.
    facts = facts_of(query, key, value, attrs, AttentionProgram("", ""))
    return PlannedAttention(facts, shape_of(tuple(scores.items())))


def passes_of_products(kernel: AttentionKernel, facts: AttentionFacts, passes: float) -> float:
    """Return how often the products of an attention are computed.

    A kernel that works in blocks meets only keys that some query sees, and its gradient makes
    scores again; where the attention is rematerialised right before it, and blocks are in no loop,
    XLA finds that both make the same ones, but on CPUs, where a gradient has the key first unless
    there is a bias.

    Args:
      kernel: what computes it.
      facts: what is known of it.
      passes: how often its arrays are gone through: 1 for inference, 3 and more for training.
    """
    again = 0.0 if passes < FORWARD_AND_GRADIENT else kernel.again
    is_made_right_before = passes > FORWARD_AND_GRADIENT and kernel.name == "blocks"
    is_alike = facts.platform != "cpu" or "bias" in facts.further
    if is_made_right_before and is_alike and are_written_out(facts.queries, causal=facts.causal):
        again = 0.0
    return (passes + again) * kernel.share(facts)


# What a backward pass keeps of a layer, and what it computes again under rematerialisation.
#
# Reverse-mode differentiation of an operation needs some of its operands or results.  These are the
# residuals.  Values that are another one in other clothes (renamed, split, cast, scaled) are kept
# once.


@dataclass(frozen=True)
class Flow:
    """The effect of the backward pass on memory at one node.

    Attributes:
      born: the gradients that there are from here on.
      done: those that nobody needs after it.
      freed: the residuals that nobody needs after it.
      in_place: whether gradients take the place of those that they are made of.
    """

    born: Shapes
    done: Shapes
    freed: Shapes
    in_place: bool


@dataclass(frozen=True)
class Backward:
    """The memory of the backward pass of a layer that is computed again.

    Attributes:
      alive: shapes of what there is when it begins.
      flow: what comes and goes at each node, from last to first.
    """

    alive: Shapes
    flow: tuple[Flow, ...]


@dataclass(frozen=True)
class Residuals:
    """The values that the backward pass of one layer needs.

    Attributes:
      saved: shapes of all residuals, by the dtype's kind.
      named: shapes of what the policy ``save`` keeps: the results of attention and of experts.
      again: nodes that full rematerialisation computes again.
      saved_again: nodes that the policy ``save`` computes again.
      onward: nodes that lead to what later layers take.
      saved_onward: those of them that the policy ``save`` computes again for these.
      plain: its backward pass where every residual is an array.
      fused: its backward pass where what is computed entry by entry is a part of its user.
    """

    saved: Shapes
    named: Shapes
    again: frozenset[Node]
    saved_again: frozenset[Node]
    onward: frozenset[Node]
    saved_onward: frozenset[Node]
    plain: Backward
    fused: Backward

    @property
    def key(self) -> object:
        """The facts that equal layers share."""
        return self.saved, self.named, self.plain, self.fused


def residuals(nodes: Sequence[Node], shape: ShapeOf) -> Residuals:
    """Find the residuals of the layer made of `nodes`."""
    results = {v for node in nodes for v in node.results}
    uses = {node: [_root(v, results) for v in _needs(node)] for node in nodes}
    fused = {node: list(_arrays(values, results)) for node, values in uses.items()}
    mine = _kept(uses, results)
    named = [v for v in map(_named, nodes) if v is not None]
    inside = set(nodes)
    outputs = [v for v in results if not inside.issuperset(v.users)]
    return Residuals(
        saved=tuple(map(shape, mine)),
        named=tuple(map(shape, named)),
        again=_made_again(mine, results, frozenset()),
        saved_again=_made_again(mine, results, frozenset(named)),
        onward=_made_again(outputs, results, frozenset()),
        saved_onward=_made_again(outputs, results, frozenset(named)),
        plain=Backward(
            tuple(map(shape, mine)), tuple(_flow(nodes, uses, results, shape, fuses=False))
        ),
        fused=Backward(
            tuple(map(shape, _kept(fused, results))),
            tuple(_flow(nodes, fused, results, shape, fuses=True)),
        ),
    )


def _kept(uses: dict[Node, list[Value]], results: set[Value]) -> list[Value]:
    needed = dict.fromkeys(v for values in uses.values() for v in values)
    return [v for v in needed if v in results and v.type.dtype.is_float]


def _arrays(values: Iterable[Value], results: set[Value]) -> Iterator[Value]:
    """Yield what `values` are made of, entry by entry: each an array that is read anyway."""
    work, seen = list(values), set[Value]()
    while work:
        value = _root(work.pop(), results)
        if value in seen:
            continue
        seen.add(value)
        if value in results and value.node is not None and value.node.op.fusable:
            work += [v for v in value.node.operands if not v.is_param]
        else:
            yield value


def _needs(node: Node) -> list[Value]:
    """Return the values that the derivative of `node` reads, parameters aside."""
    reads = node.op.residual
    read = [node.operands[i] for i in reads.operands]
    if reads.result:
        read.append(node.results[0])
    # Masks and indices are small.
    return [v for v in read if not v.is_param and v.type.dtype.is_float]


def _root(value: Value, results: set[Value]) -> Value:
    while value in results and value.node is not None and _is_view(value.node):
        value = value.node.operands[0]
    return value


def _is_view(node: Node) -> bool:
    """Whether the result is made of the first operand again rather than kept."""
    return node.op.alias or node.op.is_weighting


def root_of(value: Value) -> Value:
    """Return what `value` is by another name."""
    while value.node is not None and value.node.op.name == "rename":
        value = value.node.operands[0]
    return value


def _named(node: Node) -> Value | None:
    """Return the result of attention or of experts: what their layer adds to the hidden state."""
    if node.op.moves is RowMove.TO_TOKENS:
        return node.result
    if not node.op.is_product or "attention" not in node.loc.rpartition(".")[2]:
        return None
    return node.result if any(n.op.is_sum for n in node.result.users) and any(
        v.is_param for v in node.operands
    ) else None  # fmt: skip


def _made_again(
    needed: Iterable[Value], results: set[Value], saved: frozenset[Value]
) -> frozenset[Node]:
    """Return the nodes that must run again so that `needed` are there, given what is saved."""
    nodes: set[Node] = set()
    work = [v for v in needed if v not in saved]
    while work:
        node = work.pop().node
        if node is None or node in nodes:
            continue
        nodes.add(node)
        work += [v for v in node.operands if v in results and v not in saved]
    return frozenset(nodes)


def _flow(
    nodes: Sequence[Node],
    uses: dict[Node, list[Value]],
    results: set[Value],
    shape: ShapeOf,
    *,
    fuses: bool,
) -> Iterable[Flow]:
    """Yield what comes and goes at each node, from the last to the first."""
    last_use: dict[Value, Node] = {}
    for node in reversed(nodes):
        for value in uses[node]:
            last_use[value] = node
    freed_at: dict[Node, list[Value]] = {}
    for value, node in last_use.items():
        freed_at.setdefault(node, []).append(value)
    alive: set[Value] = set()

    def shapes(values: Iterable[Value]) -> Shapes:
        return tuple(shape(v) for v in values if v.type.dtype.is_float)

    for node in reversed(nodes):
        met = (*node.results, *(v for v in node.operands if not v.is_param))
        born = [v for v in dict.fromkeys(_root(v, results) for v in met) if v not in alive]
        alive.update(born)
        done = [v for v in node.results if v in alive and not _is_view(node)]
        alive.difference_update(done)
        freed = [v for v in freed_at.get(node, ()) if v in results]
        yield Flow(shapes(born), shapes(done), shapes(freed), fuses and node.op.gradient_in_place)


@dataclass(frozen=True)
class Weight:
    """A parameter: its name and shape, and whether it is a part of experts, and trained."""

    name: str
    shape: GlobalShape
    of_experts: bool
    trained: bool

    @property
    def elements(self) -> int:
        """The number of its elements."""
        return int(self.shape.elements)


@dataclass(frozen=True)
class StepParts:
    """An operation that moves or multiplies something.

    Attributes:
      cost: what it costs.
      moves: whether it takes tokens to experts, or back.
      operands: the shapes of its operands.
      results: the shapes of its results.
      over: of a contraction, the axes that it sums over.
      weights: the parameters among the operands, by position.
      again: how often full rematerialisation computes it again.
      block_again: how often rematerialisation of whole blocks does.
      saved_again: how often rematerialisation that saves attention and combine does.
      source: the number of what its first operand is, by whatever name, in its part.
      source_share: of an operand from another stack, one part for each layer of a unit; else 1.
      shares: of each operand, one part for each layer that takes the same value.
      exact_rows: by how much less rows there would be if a capacity did not pad them.
      axes: those of all operands, each once.
      attention: of an attention, what decides its kernel, and its scores.
    """

    cost: Cost
    moves: RowMove | None
    operands: Shapes
    results: Shapes
    over: tuple[str, ...]
    weights: tuple[Weight | None, ...]
    again: int
    block_again: int
    saved_again: int
    source: int
    source_share: float
    shares: tuple[float, ...]
    exact_rows: float
    axes: GlobalShape
    attention: PlannedAttention | None

    @cached_property
    def flops(self) -> float:
        """Two for each multiplication of its products, of all devices together."""
        return 2.0 * self.cost.products * self.axes.elements

    @cached_property
    def backward(self) -> int:
        """The work of the backward pass over its own: a gradient of each of two operands.

        That of a frozen parameter is not computed.
        """
        return 1 if self.flops and any(w and not w.trained for w in self.weights) else 2

    def computed_again(self, remat: str, in_rounds: bool = False) -> int:
        """Return how often it is computed again for the backward pass, by what is kept.

        Args:
          remat: what is kept.
          in_rounds: whether nothing of rows is kept from one round of an exchange to the next.
        """
        goes = self.moves in (RowMove.TO_SLOTS, RowMove.GATES_TO_SLOTS)
        has_rows = any("slot" in shape.names for shape in self.operands)
        if remat == "full" or (in_rounds and (has_rows or goes)):
            return self.again
        return {"save": self.saved_again, "block": self.block_again}.get(remat, 0)


@dataclass(frozen=True)
class Part:
    """A run of equal sublayers.

    Attributes:
      name: ``layers.ffn``, ``encoder.layers.attention``, ``head``.
      count: how many there are.
      steps: the operations of one.
      weights: the parameters of one that no earlier part has.
      top_k: of experts: choices a token, 0 in a dense part.
      in_layer: whether it is a part of a layer, which rematerialisation computes again.
      onward: whether it is one of a loop in its unit, and computed once more for that.
      nodes: the node of each step in the sample.
    """

    name: str
    count: int
    steps: tuple[StepParts, ...]
    weights: tuple[Weight, ...]
    top_k: int = 0
    in_layer: bool = True
    onward: bool = False
    nodes: tuple[Node, ...] = field(default=(), compare=False, repr=False)

    @cached_property
    def is_sparse(self) -> bool:
        """Whether tokens are sent to experts here."""
        return any(step.moves is RowMove.TO_SLOTS for step in self.steps)


@dataclass(frozen=True)
class PlannedLayer:
    """Equal layers.

    Attributes:
      name: ``layers``, ``encoder.layers``.
      count: how many there are.
      residuals: what the backward pass of one keeps.
      inputs: the shapes of what one takes from the layer before.
      is_first: whether it is the first of its unit, of which full rematerialisation keeps no more
        than the input.
      beside: what there is of earlier layers of its unit, computed again, when it is
        differentiated: the inputs of those of a loop, what the others need; where all of it is
        arrays, and where what is computed entry by entry is not.
      block_beside: the same where loops keep what their gradients need.
    """

    name: str
    count: int
    residuals: Residuals
    inputs: Shapes
    is_first: bool
    beside: tuple[Shapes, Shapes]
    block_beside: tuple[Shapes, Shapes]


# What a plan knows of the head, whose logits are in memory a chunk of tokens at a time.


@dataclass(frozen=True)
class PlannedHead:
    """The head of a model.

    Attributes:
      logits: the shape of what it makes.
      weights: the parameters that it reads.
      is_cut: whether it may run over a chunk of tokens at a time.
    """

    logits: GlobalShape
    weights: tuple[Weight, ...]
    is_cut: bool


def head_of(graph: Graph, shape: ShapeOf, weight: Callable[[Value], Weight]) -> PlannedHead | None:
    """Return the head of `graph`; None where it has no logits to train.

    Args:
      graph: the graph.
      shape: returns the global shape of a value.
      weight: returns what a plan knows of a parameter.
    """
    if not is_trainable(graph):
        return None
    head = split_head(graph)
    params = dict.fromkeys(p for value in head.weights for p in _params(value))
    return PlannedHead(shape(head.logits), tuple(map(weight, params)), head.is_cut)


def _params(value: Value) -> Iterator[Value]:
    """Yield the parameters that `value` is made of."""
    if value.is_param:
        yield value
    elif value.node is not None:
        for operand in value.node.operands:
            yield from _params(operand)


# Units of rematerialisation: what ``roll-layers`` makes one body of, and what is a loop in it.
#
# A unit is the shortest run of layers that a stack repeats: one layer, or four of which the last is
# sparse.  Layers of a unit that are alike and follow one another are a loop within it.  Where each
# of them is a checkpoint of its own, they run once more than the others of the unit.

LAYER = re.compile(r"^(.*?\.?layers\.)(\d+)(?:\.(.*))?$")
"""A location in a layer: the stack, the number of the layer, the sublayer."""


@dataclass(frozen=True)
class Unit:
    """A unit.

    Attributes:
      looped: for each of its layers whether it is one of a loop.
    """

    looped: tuple[bool, ...]

    @property
    def size(self) -> int:
        """The number of its layers."""
        return len(self.looped)

    @property
    def as_whole(self) -> Unit:
        """The unit where layers of its loops are no checkpoints."""
        return Unit((False,) * self.size)


def layer_of(loc: str) -> str:
    """Return the layer that a location belongs to, or the location where it is in none."""
    match = LAYER.match(loc)
    return f"{match[1]}{match[2]}" if match else loc


def stack_of(of: Value | Node) -> str | None:
    """Return the stack that a node belongs to, or that the node that makes a value does."""
    node = of if isinstance(of, Node) else of.node
    match = LAYER.match(node.loc) if node is not None else None
    return match[1] if match else None


def units_of(graph: Graph, shape: ShapeOf) -> dict[str, Unit]:
    """Return the unit of each stack."""
    layers: dict[str, dict[int, list[Node]]] = {}
    for node in graph:
        match = LAYER.match(node.loc)
        if match:
            layers.setdefault(match[1], {}).setdefault(int(match[2]), []).append(node)
    return {
        stack: _unit([_look(numbered[i], shape) for i in sorted(numbered)])
        for stack, numbered in layers.items()
    }


def _look(nodes: Sequence[Node], shape: ShapeOf) -> tuple[object, ...]:
    return tuple((n.op.name, *map(shape, n.results)) for n in nodes)


def _unit(looks: Sequence[object]) -> Unit:
    runs = [list(group) for _, group in groupby(looks[: _period(looks)])]
    several = len(runs) > 1
    return Unit(tuple(several and len(run) > 1 for run in runs for _ in run))


def _period(items: Sequence[object]) -> int:
    """Return the length of the shortest run that `items` repeat, 1 where they repeat none."""
    count = len(items)
    for length in range(1, count // 2 + 1):
        if count % length == 0 and all(items[i] == items[i % length] for i in range(count)):
            return length
    return 1


def times_again(number: int, unit: Unit, for_itself: bool, onward: bool) -> int:
    """Return how often a node runs again.

    Args:
      number: of its layer in the unit.
      unit: the unit.
      for_itself: whether its own layer needs it to be differentiated.
      onward: whether it leads to what the layers behind its own take.
    """
    if unit.looped[number]:
        return for_itself + onward
    return int(for_itself or (onward and number + 1 < unit.size))
