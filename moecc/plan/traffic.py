"""The collectives of one part of a model, under a strategy.

They are those that propagation finds for the part, which passes write into the graph that runs, and
their transposes in the backward pass.  Here they are counted: how often a step of training, or a
forward pass, does each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moecc.ir.graph import Node, Value
from moecc.ir.traits import RowMove
from moecc.plan.collectives import Transfer
from moecc.plan.parts import Part, Shape, Step, Weight, root_of
from moecc.plan.sharding import Sharded, Sharding
from moecc.plan.step import StepConfig, Strategy
from moecc.plan.workload import Workload
from moecc.sharding.collectives import (
    TRANSPOSED,
    GradientSum,
    Sent,
    Slice,
    SparseLayer,
    Stage,
    route,
    sent,
    sparse_layer,
)
from moecc.sharding.propagate import Ref, Reshard
from moecc.sharding.vias import ROUND_ROOM, WAYS, Via, via
from moecc.sharding.vias import via as way_of

# What one part of a model sends under a layout, whatever is computed again.

PARAMETERS = "parameters"
"""Why a parameter that is stored in parts is gathered."""


class Moved(NamedTuple):
    """A collective.

    Attributes:
      op: its name.
      axes: the mesh axes that it runs over, in the order of the mesh.
      elements: of the tensor that it moves, on one device.
      why: what for, in a few words.
      of_rows: whether it moves rows of experts, of which there may be more than in the graph.
      odd: whether it gathers shards with odd numbers of rows.
      is_wide: whether an element has four bytes at least: gates are float32, token ids int32.
      weight: the parameter that it gathers, or whose gradient it sums.
      leaves_work: see `Transfer`.
    """

    op: str
    axes: tuple[str, ...]
    elements: float
    why: str
    of_rows: bool = False
    odd: bool = False
    is_wide: bool = False
    weight: str = ""
    leaves_work: bool = False


class Carried(NamedTuple):
    """What is done with a value that a step of a part makes or takes.

    Attributes:
      step: the step.
      moved: the collectives.
      share: of what several parts have in common, the share of one.
      in_route: whether the way to the experts has it instead.
    """

    step: Step
    moved: tuple[Moved, ...]
    share: float = 1.0
    in_route: bool = False


@dataclass(frozen=True)
class PartTraffic:
    """What a part sends under a layout.

    Attributes:
      params: what gathers its parameters.
      gradients: what sums their gradients.
      forward: what carries out its sums and brings values elsewhere.
      backward: what sums gradients of values of which several devices made something.
      layer: its routed layer, if it has one.
      steps: its steps by node.
    """

    params: tuple[Moved, ...]
    gradients: tuple[Moved, ...]
    forward: tuple[Carried, ...]
    backward: tuple[Carried, ...]
    layer: SparseLayer | None
    steps: dict[Node, Step]


def traffic_of(part: Part, sharded: Sharded) -> PartTraffic:
    """Return what `part` sends."""
    sites = (sharded.work.sample.sites[node] for node in part.nodes)
    layer = sparse_layer(sites, sharded.found) if part.is_sparse else None
    reader = _Reader(part, sharded, layer)
    gathers = [(w, tuple(reader.gathers(w))) for w in part.weights]
    return PartTraffic(
        params=tuple(m for _, found in gathers for m in found),
        gradients=tuple(m for w, found in gathers if w.trained for m in reader.summed(w, found)),
        forward=tuple(reader.forward()),
        backward=tuple(reader.backward()),
        layer=layer,
        steps=reader.steps,
    )


def moved(
    sharded: Sharded, one: Sent, shape: Shape, why: str, transposed: bool = False
) -> Moved | None:
    """Return a collective on a value of `shape`, or its transpose; None where nothing is sent."""
    op = TRANSPOSED.get(one.op) if transposed else None if one.is_local else one.op
    axes = sharded.layout.ordered(one.mesh)
    if op is None or sharded.layout.size(axes) == 1:
        return None
    elements = shape.elements / sharded.shards(one.type)
    return Moved(op, axes, elements, why, shape.has_slots, is_wide=not one.type.dtype.is_float)


class _Reader:
    """Reads of a propagation what one part sends."""

    def __init__(self, part: Part, sharded: Sharded, layer: SparseLayer | None) -> None:
        self.sharded = sharded
        self.layer = layer
        self.in_layer = part.in_layer
        self.steps = dict(zip(part.nodes, part.steps, strict=True))

    def gathers(self, weight: Weight) -> Iterator[Moved]:
        """Yield how a parameter that is stored in parts is gathered."""
        stored, used = self.sharded.stored(weight), self.sharded.used(weight)
        for one in self.sharded.work.sample.resharded(stored, used):
            found = moved(self.sharded, one, weight.shape, PARAMETERS)
            if found is not None:
                yield found._replace(odd=self.sharded.is_odd(weight), weight=weight.name)

    def summed(self, weight: Weight, gathers: Iterable[Moved]) -> Iterator[Moved]:
        """Yield how a gradient is summed: scattered where it is stored in parts, else reduced."""
        left = set(self.sharded.summed(weight))
        for gathered in gathers:
            axes = tuple(n for n in gathered.axes if n in left)
            left.difference_update(gathered.axes)
            if axes:
                elements = gathered.elements
                yield Moved("reduce_scatter", axes, elements, "gradients", weight=weight.name)
        axes = self.sharded.layout.ordered(left)
        if self.sharded.layout.size(axes) > 1:
            elements = weight.shape.elements / self.sharded.shards(self.sharded.stored(weight))
            yield Moved("all_reduce", axes, elements, "gradients", weight=weight.name)

    def forward(self) -> Iterator[Carried]:
        """Yield what carries out the sums of the part, and brings other values elsewhere."""
        for node, step in self.steps.items():
            operands = self.sharded.found.operands[node]
            for ref, shape, share in zip(operands, step.operands, step.shares, strict=True):
                if isinstance(ref, Reshard) and ref.node is node and not ref.value.is_param:
                    carried = self._carried(ref, step, shape, "values to where they are used")
                    # What is brought to the first of several layers is there for the others.
                    yield carried._replace(share=share if self.in_layer else 1.0)
            for value, shape in zip(node.results, step.results, strict=True):
                seen = self.sharded.found.visible[value]
                if isinstance(seen, Reshard):
                    why = "partial sums" if seen.is_sum else "what was looked up"
                    yield self._carried(seen, step, shape, why)

    def _carried(self, reshard: Reshard, step: Step, shape: Shape, why: str) -> Carried:
        done = self.sharded.work.sample.resharded(reshard.source, reshard.target)
        found = (moved(self.sharded, one, shape, why) for one in done)
        return Carried(
            step, tuple(m for m in found if m is not None), in_route=self._routed(reshard)
        )

    def _routed(self, reshard: Reshard) -> bool:
        """Whether a reshard brings rows to experts or back, or sums what they make."""
        if self.layer is None:
            return False
        dispatch, combine = self.layer.dispatch.node, self.layer.combine.node
        ends: set[Ref] = {dispatch.result, combine.result}
        if self.layer.gates is not None:
            ends.add(self.layer.gates.dispatch.node.result)
        last: Ref = self.sharded.found.operands[combine][0]
        while isinstance(last, Reshard):
            ends |= {last, last.operand}
            last = last.operand
        return reshard in ends or reshard.operand in ends

    def backward(self) -> Iterator[Carried]:
        """Yield the sums of gradients of values that several operations may take.

        Those of one value are added first, and summed once.
        """
        found: dict[Value, tuple[GradientSum, set[str]]] = {}
        for node in self.steps:
            for one in self.sharded.gradient_sums.get(node, ()):
                root = root_of(one.site.operands[one.number])
                known = found[root][1] if root in found else set()
                found[root] = one, known | one.axes
        for one, axes in found.values():
            node, number = one.site.node, one.number
            step, shape = self.steps[node], self.steps[node].operands[number]
            share, rows = step.source_share if number == 0 else 1.0, shape.has_slots
            yield Carried(step, tuple(self._gradient(one, axes, shape)), share, rows)
        yield from self._returned_gradients()

    def _gradient(self, one: GradientSum, axes: set[str], shape: Shape) -> Iterator[Moved]:
        """Yield how the gradient of a value is summed: scattered where the value was gathered."""
        node, number, why = one.site.node, one.number, "gradients of partial sums"
        ref, layout = self.sharded.found.operands[node][number], self.sharded.layout
        elements = shape.elements / self.sharded.shards(self.sharded.found.used(node)[number])
        scattered = axes & self._gathered_over(ref)
        if scattered:
            mesh = layout.ordered(scattered)
            yield Moved("reduce_scatter", mesh, elements, why, shape.has_slots)
            elements /= layout.size(mesh)
        if axes - scattered:
            mesh = layout.ordered(axes - scattered)
            yield Moved("all_reduce", mesh, elements, why, shape.has_slots)

    def _gathered_over(self, ref: Ref) -> set[str]:
        """Return the mesh axes over which a value is gathered for an operation."""
        if not isinstance(ref, Reshard):
            return set()
        done = self.sharded.work.sample.resharded(ref.source, ref.target)
        return {m for one in done if one.op == "all_gather" for m in one.mesh}

    def _returned_gradients(self) -> Iterator[Carried]:
        """Yield what brings back gradients of what was scattered, or exchanged but for experts."""
        for carried in self.forward():
            if carried.in_route:
                continue
            back = tuple(
                m._replace(op=TRANSPOSED[m.op], why=f"gradients of {m.why}")
                for m in carried.moved
                if m.op in ("reduce_scatter", "all_to_all") and not m.is_wide
            )
            if back:
                yield carried._replace(moved=back)


# What the ways to the experts send: the stages of a route, forward, again and transposed.


@dataclass(frozen=True)
class Work:
    """How often a step does what.

    Attributes:
      strategy: what is chosen.
      config: the settings of the step.
    """

    strategy: Strategy
    config: StepConfig

    def gathers(self, part: Part) -> int:
        """Return how often parameters are gathered.

        Those of layers are gathered once more for the backward pass, whatever else is kept.
        """
        if not self.config.train or not part.in_layer:
            return 1
        return 2 + (part.onward and self.strategy.remat != "none")

    def routed(self, one: Routed) -> int:
        """Return how often a collective on the way to the experts or back runs."""
        if one.step is not None:
            return self.forward(one.step)
        runs = not one.stream or self.strategy.stream_axis in one.stream
        return int(self.config.train and runs)

    def forward(self, step: Step) -> int:
        """Return how often a step runs forward, and again for the backward pass."""
        if not self.config.train:
            return 1
        return 1 + step.computed_again(self.strategy.remat, self.strategy.in_rounds)


class Routed(NamedTuple):
    """A collective on the way to the experts or back.

    Attributes:
      moved: the collective.
      step: what it runs forward with, and again; None: once, in the backward pass.
      stream: mesh axes of which the stream between layers must be one for it to run; empty: always.
    """

    moved: Moved
    step: Step | None
    stream: tuple[str, ...] = ()


def exchange(
    layer: SparseLayer, way: Via, part: Slice | None, steps: Mapping[Node, Step], sharded: Sharded
) -> Iterator[Routed]:
    """Yield what tokens and rows of a layer go through on a way to the experts and back.

    Args:
      layer: the layer.
      way: the way.
      part: how rows are cut in slices; None: they are sent whole.
      steps: the steps of the part that has the layer, by node.
      sharded: the part under its layout.
    """
    leaves_work = _leaving_work(layer, way, steps)
    for stage in route(layer, way, sharded.found, part):
        step, shape = _subject(stage, layer, steps)
        for one in sent(stage.source, stage.steps):
            found = moved(sharded, one, shape, _why(stage, way, one.op))
            back = moved(sharded, one, shape, "", transposed=True)
            is_gate = stage.value == "gates"
            if found is not None:
                free = (stage.value, found.op) in leaves_work
                yield Routed(found._replace(is_wide=is_gate, leaves_work=free), step)
            if back is not None:
                # Where all devices have all of a gradient, they take their part of it.
                whole = stage.value == "added" and one.op == "all_gather"
                why, free = _why(stage, way, back.op), (stage.value, back.op) in leaves_work
                named = back._replace(why=why, is_wide=is_gate, leaves_work=free)
                yield Routed(named, None, one.mesh if whole else ())
    if way.tokens_everywhere:
        yield from _gradients_of_rows(layer, steps, sharded)


def _leaving_work(
    layer: SparseLayer, way: Via, steps: Mapping[Node, Step]
) -> Collection[tuple[str, str]]:
    """Return the stages, and what they do, that leave a layer products which need not wait.

    Gathered tokens are routed again.  So while sums are scattered there is the routing of the
    device's own tokens, which losses read, and while gradients are, that of the router.  And the
    gradient of what experts add to tokens is that of what leaves the layer, if nothing else is done
    with it: a turn that computes the layer again begins with it.
    """
    if way.exchanges_rows:
        return ()
    scattered = [("added", "reduce_scatter"), ("tokens", "reduce_scatter")]
    return [*scattered, *([("added", "all_gather")] if _is_last(layer, steps) else [])]


def _is_last(layer: SparseLayer, steps: Mapping[Node, Step]) -> bool:
    """Whether what experts make of tokens is only added to what leaves their part."""
    pending, seen = [layer.combine.node], set[Node]()
    while pending:
        users = {u for v in pending.pop().results for u in v.users if u in steps} - seen
        if not all(user.op.is_sum for user in users):
            return False
        seen |= users
        pending.extend(users)
    return True


def _gradients_of_rows(
    layer: SparseLayer, steps: Mapping[Node, Step], sharded: Sharded
) -> Iterator[Routed]:
    """Yield what brings together the gradients of rows, of which a device has its experts' own.

    All devices of the experts dispatch all rows, and gates that go with them.  Slots of fixed
    number are gathered from those that have their experts; as many as there are are packed
    otherwise on each device, and summed.
    """
    mesh = tuple(m for m in layer.expert_mesh if m not in layer.exchanged)
    op = "all_gather" if layer.rows.ragged is None else "all_reduce"
    sent = [(layer.dispatch.node, layer.rows, False)]
    if layer.gates is not None:
        sent.append((layer.gates.dispatch.node, layer.gates.sent, True))
    for node, type, is_gate in sent:
        shape = steps[node].results[0]
        one = Sent(op, mesh, type, is_local=False)
        found = moved(sharded, one, shape, "gradients of rows")
        if found is not None:
            yield Routed(found._replace(is_wide=is_gate), None)


def _subject(stage: Stage, layer: SparseLayer, steps: Mapping[Node, Step]) -> tuple[Step, Shape]:
    """Return the step that makes what a stage brings elsewhere, and its shape."""
    dispatch, combine = layer.dispatch.node, layer.combine.node
    if stage.value == "tokens":
        return steps[dispatch], steps[dispatch].operands[0]
    if stage.value == "rows":
        return steps[dispatch], steps[dispatch].results[0]
    if stage.value == "gates":
        assert layer.gates is not None, "they are sent"
        sent = steps[layer.gates.dispatch.node]
        return sent, sent.results[0]
    if stage.value == "added":
        return steps[combine], steps[combine].results[0]
    return steps[_maker(layer.combine.operands[0])], steps[combine].operands[0]


def _maker(value: Value) -> Node:
    assert value.node is not None, "experts make what is combined"
    return value.node


_ROWS = {"all_gather": "parts of rows", "reduce_scatter": "sums of rows"}
_SLICES = {"all_gather": "parts of tokens", "reduce_scatter": "sums of tokens"}
_TOKENS = {"all_gather": "tokens to all experts", "reduce_scatter": "sums to their tokens"}


def _why(stage: Stage, way: Via, op: str) -> str:
    """Return what a collective is for, in a few words."""
    if op == "all_reduce":
        return "sums of all experts" if way.tokens_everywhere else "partial sums"
    if not way.exchanges_rows:
        is_gradient = stage.value == "added" and op == "all_gather"
        return "gradients to all experts" if is_gradient else _TOKENS.get(op, "")
    names = _ROWS if stage.value in ("rows", "made") else _SLICES
    return names.get(op, "rows to experts and back")


# What each way to the experts and back costs; the ways are the rows of `moecc.sharding.vias`.

SLICED = tuple(way.name for way in WAYS if way.is_sliced and not way.per_axis)
"""Those that a plan tries in slices: devices that share the neurons of a row send a part each."""

BOUND = 1.25
"""The capacity factor of an exchange whose experts take every token in the graph."""


@dataclass(frozen=True)
class Rows:
    """The tokens and rows of one device at one sparse layer.

    Attributes:
      tokens: tokens.
      rows: rows that the graph asks for, the padding of its capacity included.
      row_bytes: of one row, or of one token.
      devices: of the experts' axes.
      top_k: choices of a token.
      experts: how many there are.
      dropless: whether every token is taken.
      in_rounds: whether a dropless exchange has as many rounds as its rows need.
    """

    tokens: float
    rows: float
    row_bytes: float
    devices: int
    top_k: int
    experts: int
    dropless: bool
    in_rounds: bool = False

    def factor(self, via: str) -> float:
        """Return how many rows are computed for each row of the graph."""
        return 1.0 if exact(via, self.dropless) else BOUND

    def buffer_rows(self, via: str) -> float:
        """Return the rows that a device must have room for.

        Dropless, the worst case is that all choices of all devices fall on one: a token has at most
        one row for each expert there.  In rounds there is room for somewhat more than the mean.
        """
        way = way_of(via)
        if not self.dropless or way is None or way.is_bounded:
            return self.rows * self.factor(via)
        most = min(self.top_k, self.experts // self.devices)
        worst = self.tokens * most * (1 if way.tokens_everywhere else self.devices)
        return min(worst, ROUND_ROOM * self.rows) if self.in_rounds else worst


def exact(via: str, dropless: bool) -> bool:
    """Whether an exchange loses no row that the graph keeps."""
    way = way_of(via)
    return way is None or not (way.is_bounded and dropless)


_WIDE_BYTES = 4


def _moved(carried: Carried, by_route: bool) -> Sequence[Moved]:
    """Return what a step moves, but for what the way to the experts brings itself."""
    return () if by_route and carried.in_route else carried.moved


def part_transfers(
    part: Part, config: StepConfig, strategy: Strategy, local: Sharding
) -> Iterator[Transfer]:
    """Yield the collectives of one part, forward and, in training, backward."""
    sharded = local.sharded
    found = sharded.once(id(part), lambda: traffic_of(part, sharded))
    doing = Work(strategy, config)
    way = None if found.layer is None else via(strategy.via)

    def transfer(one: Moved, times: float, *, waits: bool = True) -> Transfer:
        elements = one.elements * local.rows if one.of_rows else one.elements
        size = elements * max(config.compute_type.itemsize_bytes, _WIDE_BYTES * one.is_wide)
        free = one.leaves_work and config.train
        return Transfer(one.op, one.axes, size, times, one.why, waits, one.odd, one.weight, free)

    for one in found.params:
        yield transfer(one, doing.gathers(part), waits=False)
    for one in found.gradients if config.train else ():
        yield _summed(transfer(one, 1, waits=False), config)
    for carried in found.forward:
        # What several layers take is brought to all of them at once, and stays there.
        again = doing.forward(carried.step) if carried.share == 1 else 1
        for one in _moved(carried, way is not None):
            yield transfer(one, again * carried.share)
    for carried in found.backward if config.train else ():
        yield from (transfer(m, carried.share) for m in _moved(carried, strategy.sliced))
    if found.layer is not None and way is not None:
        times = _exchanged((part, found, found.layer), way, doing, sharded)
        yield from (transfer(one, count) for one, count in times.items() if count)


def _summed(gradient: Transfer, config: StepConfig) -> Transfer:
    """Return how a gradient is summed, in a micro-batch of several.

    Those of parameters that are stored in parts are scattered in each micro-batch, by the transpose
    of what gathers the parameter, in the type of the computation.  Others are added first, and
    reduced once.
    """
    if gradient.op != "all_reduce":
        return gradient
    wider = config.reduce_type.itemsize_bytes / config.compute_type.itemsize_bytes
    size, times = gradient.tensor_bytes * wider, gradient.times / config.micro_batches
    return gradient._replace(tensor_bytes=size, times=times)


def _exchanged(
    of: tuple[Part, PartTraffic, SparseLayer], way: Via, doing: Work, sharded: Sharded
) -> Counter[Moved]:
    """Return how often each collective of `way` to the experts of a part runs."""
    part, found, layer = of
    strategy = doing.strategy
    routed = sharded.once(
        (id(part), way.name, strategy.sliced),
        lambda: tuple(exchange(layer, way, _slice(layer, strategy), found.steps, sharded)),
    )
    times: Counter[Moved] = Counter()
    for each in routed:
        times[each.moved] += doing.routed(each)
    return times


def _slice(layer: SparseLayer, strategy: Strategy) -> Slice | None:
    return Slice(layer.width, strategy.layout.tensor_axes[0]) if strategy.sliced else None


def sparse_rows(
    part: Part, work: Workload, config: StepConfig, strategy: Strategy, local: Sharding
) -> Rows:
    """Return the tokens and rows of a device at `part`, which has experts."""
    sent = (s for s in part.steps if s.moves is RowMove.TO_SLOTS)
    # Losses and metrics may send a number of each token, too.
    step = next(s for s in sent if "embed" in s.results[0].names)
    layout, rows = strategy.layout, step.results[0]
    embed = rows.size("embed")
    return Rows(
        tokens=local.elements(step.operands[0]) / embed,
        # Rows are counted where their tokens are, before any exchange.
        rows=rows.elements / embed / layout.shards["batch"],
        row_bytes=embed * config.compute_type.itemsize_bytes,
        devices=layout.shards["expert"],
        top_k=part.top_k,
        experts=work.experts,
        dropless=work.dropless,
        in_rounds=strategy.in_rounds,
    )
