"""The collectives of a step: which a layout and a strategy ask for, how often, bytes and seconds.

They are those that propagation finds for a part of a model, which passes write into the graph that
runs, and their transposes in the backward pass.

Bytes are what each device sends to others, by the algorithm that sends the least: rings for gathers
and reductions, a message to each peer for exchanges.  ``tensor_bytes`` is how compiled programs are
counted: the size of the full tensor, of an exchange that of one device's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from moecc.ir.graph import Node, Value
from moecc.ir.traits import RowMove
from moecc.plan.memory import Sharded, Sharding
from moecc.plan.networks import Route
from moecc.plan.parts import GlobalShape, Part, StepParts, Weight, root_of
from moecc.plan.step import StepConfig, Strategy
from moecc.plan.workload import SentStep, Workload
from moecc.sharding.collectives import (
    TRANSPOSED,
    GradientSum,
    RowSlice,
    SparseLayer,
    Stage,
    route,
    sent,
    sparse_layer,
)
from moecc.sharding.propagate import Ref, Reshard
from moecc.sharding.vias import ROUND_ROOM, WAYS, Via, via


def sent_bytes(op: str, devices: int, tensor_bytes: float) -> float:
    """Return the bytes that one device sends.

    Args:
      op: a collective that sends something.
      devices: how many take part.
      tensor_bytes: the gathered result of an all-gather, the operand of a reduce-scatter or
        all-reduce, the rows of one device for an exchange; the rows are spread evenly.

    An all-gather passes every part but one on, (n − 1)/n of the result, and a reduce-scatter is the
    same backwards; an all-reduce is both.  An exchange keeps its own part.
    """
    share = (devices - 1) / devices
    return tensor_bytes * share * (2 if op == "all_reduce" else 1)


def seconds(op: str, route: Route, tensor_bytes: float) -> float:
    """Return the seconds of a collective on ideal links; arguments as for `sent_bytes`."""
    if op.endswith("all_to_all"):
        return route.all_to_all(tensor_bytes)
    return route.all_gather(tensor_bytes) * (2 if op == "all_reduce" else 1)


Phase = Literal["parameters", "gradients", "forward", "backward", "route"]
"""The reason for a collective: it gathers parameters; sums their gradients; brings values elsewhere
in the forward pass; sums gradients of values; takes tokens to experts and back."""


class Collective(NamedTuple):
    """A collective of one part of a step.

    Attributes:
      op: its operation.
      axes: the mesh axes that it runs over, in the order of the mesh.
      elements: of the tensor that it moves, on one device.
      why: its purpose, in a few words.
      phase: see `Phase`.
      weight: the parameter that it gathers, or whose gradient it sums; empty for a collective that
        computation waits for.
      step: the operation with which it runs, forward and again; None: once, in the backward pass.
      share: of a collective that several parts have in common, the share of one.
      stream: mesh axes, one of which must shard the activations between layers for it to run.
      in_route: whether it brings a value to the experts or back, as the way to them does.
      of_rows: whether it moves rows of experts, of which there may be more than in the graph.
      is_odd: whether it gathers shards with odd numbers of rows.
      is_wide: whether an element has four bytes at least: gates are float32, token ids int32.
      leaves_work: whether its layer has products that do not wait for it.
      tensor_bytes: of one run, see `sent_bytes`; of a priced move.
      times: runs in a step; of a priced move.
      seconds: of all runs; of a priced move.
      beside: of a scheduled move, the share of its runs that computation runs beside.
      hidden_seconds: of all its runs, those that pass beside computation.
    """

    op: str
    axes: tuple[str, ...]
    elements: float
    why: str
    phase: Phase = "forward"
    weight: str = ""
    step: StepParts | None = None
    share: float = 1.0
    stream: tuple[str, ...] = ()
    in_route: bool = False
    of_rows: bool = False
    is_odd: bool = False
    is_wide: bool = False
    leaves_work: bool = False
    tensor_bytes: float = 0.0
    times: float = 0.0
    seconds: float = 0.0
    beside: float = 0.0
    hidden_seconds: float = 0.0

    @property
    def is_exchange(self) -> bool:
        """Whether it exchanges rows."""
        return self.op.endswith("all_to_all")

    @property
    def waits(self) -> bool:
        """Whether computation waits for it; parameters and their gradients it does not wait for."""
        return not self.weight

    def on(self, kind: str) -> Collective:
        """Return the collective that a machine of `kind` runs.

        XLA puts odd numbers of rows together on a TPU by a sum of arrays that are zero but for a
        shard.
        """
        return self._replace(op="all_reduce") if self.is_odd and kind == "tpu" else self


@dataclass(frozen=True)
class PartTraffic:
    """The collectives of a part under a layout, whatever the strategy.

    Attributes:
      collectives: all but those of a way to the experts.
      layer: its routed layer, if it has one.
      steps: its steps by node.
    """

    collectives: tuple[Collective, ...]
    layer: SparseLayer | None
    steps: Mapping[Node, StepParts]


def part_collectives(
    part: Part, config: StepConfig, strategy: Strategy, local: Sharding
) -> Iterator[Collective]:
    """Yield the collectives of one part with bytes and times, forward and backward."""
    sharded = local.sharded
    traffic = sharded.once(id(part), lambda: _traffic_of(part, sharded))
    layer, way = traffic.layer, None if traffic.layer is None else via(strategy.via)
    times: dict[Collective, float] = {}
    if layer is not None and way is not None:
        part_of_row = (
            RowSlice(layer.width, strategy.layout.tensor_axes[0]) if strategy.sliced else None
        )
        routed = sharded.once(
            (id(part), way.name, strategy.sliced),
            lambda: tuple(_routed(layer, way, part_of_row, traffic.steps, sharded)),
        )
        for each in routed:
            # Equal ones are one row of a report, whatever they run with.
            key = each._replace(step=None, stream=())
            times[key] = times.get(key, 0) + _times(each, part, config, strategy, way)
    width = config.compute_type.itemsize_bytes
    plain = ((each, _times(each, part, config, strategy, way)) for each in traffic.collectives)
    for each, count in (*plain, *times.items()):
        if not count:
            continue
        elements = each.elements * local.values.rows if each.of_rows else each.elements
        size = elements * max(width, 4 * each.is_wide)
        if each.phase == "gradients" and each.op == "all_reduce":
            # Gradients of parameters that are stored in parts are scattered in each micro-batch, by
            # the transpose of their gather, in the type of the computation.  Others are added
            # first, and reduced once.
            size *= config.reduce_type.itemsize_bytes / width
            count /= config.micro_batches
        yield each._replace(
            step=None, tensor_bytes=size, times=count, leaves_work=each.leaves_work and config.train
        )


def _times(
    move: Collective, part: Part, config: StepConfig, strategy: Strategy, way: Via | None
) -> float:
    """Return how often a collective runs in a micro-batch."""
    if move.phase == "parameters":
        # Those of layers are gathered once more for the backward pass, whatever else is kept.
        if not config.train or not part.in_layer:
            return 1
        return 2 + (part.onward and strategy.remat != "none")
    if move.phase == "backward":
        return move.share * (config.train and not (move.in_route and strategy.sliced))
    if move.step is None:
        return int(config.train and (not move.stream or strategy.stream_axis in move.stream))
    if move.in_route and way is not None:
        return 0
    again = move.step.computed_again(strategy.remat, strategy.in_rounds) if config.train else 0
    if move.phase == "route":
        return 1 + again
    # A value that several layers take is brought to all of them at once, and stays there.
    return (1 + again if move.share == 1 else 1) * move.share


def _traffic_of(part: Part, sharded: Sharded) -> PartTraffic:
    sites = (sharded.work.sample.sites[node] for node in part.nodes)
    layer = sparse_layer(sites, sharded.propagation) if part.is_sparse else None
    steps = dict(zip(part.nodes, part.steps, strict=True))
    gathers = [(weight, list(_gathers(weight, sharded))) for weight in part.weights]
    summed = (c for w, each in gathers if w.trained for c in _summed(w, each, sharded))
    forward = list(_forward(part, steps, layer, sharded))
    returned = (
        moved._replace(op=TRANSPOSED[moved.op], why=f"gradients of {moved.why}", phase="backward")
        for moved in forward
        if moved.op in ("reduce_scatter", "all_to_all") and not (moved.is_wide or moved.in_route)
    )
    return PartTraffic(
        (*(c for _, each in gathers for c in each), *summed, *forward,
         *_backward(steps, sharded), *returned), layer, steps,
    )  # fmt: skip


def _moved(
    sharded: Sharded,
    step: SentStep,
    shape: GlobalShape,
    why: str,
    phase: Phase,
    *,
    is_transposed: bool = False,
) -> Collective | None:
    """Return a collective on a value of `shape`, or its transpose; None where nothing is sent."""
    op, mesh, type = step
    sending = TRANSPOSED.get(op) if is_transposed else None if op == "shard" else op
    axes = sharded.layout.ordered(mesh)
    if sending is None or sharded.layout.size(axes) == 1:
        return None
    elements = shape.elements / sharded.layout.shards_of(type)
    is_wide = not type.dtype.is_float
    return Collective(sending, axes, elements, why, phase, of_rows=shape.has_slots, is_wide=is_wide)


PARAMETERS = "parameters"


def _gathers(weight: Weight, sharded: Sharded) -> Iterator[Collective]:
    """Yield the gathers of a parameter that is stored in parts."""
    stored, used = sharded.stored(weight), sharded.used(weight)
    for step in sharded.work.sample.resharded(stored, used):
        gather = _moved(sharded, step, weight.shape, PARAMETERS, "parameters")
        if gather is not None:
            yield gather._replace(is_odd=sharded.is_odd(weight), weight=weight.name)


def _summed(weight: Weight, gathers: list[Collective], sharded: Sharded) -> Iterator[Collective]:
    """Yield the sums of a gradient: scattered where it is stored in parts, else reduced."""
    layout, left = sharded.layout, set(sharded.summed(weight))
    for gather in gathers:
        axes = tuple(n for n in gather.axes if n in left)
        left.difference_update(gather.axes)
        if axes:
            yield Collective(
                "reduce_scatter", axes, gather.elements, "gradients", "gradients", weight.name
            )
    axes = layout.ordered(left)
    if layout.size(axes) > 1:
        elements = weight.shape.elements / layout.shards_of(sharded.stored(weight))
        yield Collective("all_reduce", axes, elements, "gradients", "gradients", weight.name)


def _forward(
    part: Part, steps: Mapping[Node, StepParts], layer: SparseLayer | None, sharded: Sharded
) -> Iterator[Collective]:
    """Yield the collectives that carry out the sums of a part, and bring other values elsewhere."""
    propagation, routed = sharded.propagation, _reshards_of_route(layer, sharded)

    def brought(
        reshard: Reshard, step: StepParts, shape: GlobalShape, why: str, share: float = 1.0
    ) -> Iterator[Collective]:
        in_route = reshard in routed or reshard.operand in routed
        for each in sharded.work.sample.resharded(reshard.source, reshard.target):
            if move := _moved(sharded, each, shape, why, "forward"):
                yield move._replace(step=step, share=share, in_route=in_route)

    for node, step in steps.items():
        operands = zip(propagation.operands[node], step.operands, step.shares, strict=True)
        for ref, shape, share in operands:
            if isinstance(ref, Reshard) and ref.node is node and not ref.value.is_param:
                # A value that is brought to the first of several layers is there for the others.
                part_share = share if part.in_layer else 1.0
                yield from brought(ref, step, shape, "values to where they are used", part_share)
        for value, shape in zip(node.results, step.results, strict=True):
            seen = propagation.visible[value]
            if isinstance(seen, Reshard):
                why = "partial sums" if seen.is_sum else "what was looked up"
                yield from brought(seen, step, shape, why)


def _reshards_of_route(layer: SparseLayer | None, sharded: Sharded) -> set[Ref]:
    """Return the values between which a reshard belongs to the way to the experts."""
    if layer is None:
        return set()
    combine = layer.combine.node
    ends: set[Ref] = {layer.dispatch.node.result, combine.result}
    if layer.gates is not None:
        ends.add(layer.gates.dispatch.node.result)
    last: Ref = sharded.propagation.operands[combine][0]
    while isinstance(last, Reshard):
        ends |= {last, last.operand}
        last = last.operand
    return ends


def _backward(steps: Mapping[Node, StepParts], sharded: Sharded) -> Iterator[Collective]:
    """Yield the sums of gradients of values that several operations may take.

    Those of one value are added first, and summed once.
    """
    sums: dict[Value, tuple[GradientSum, set[str]]] = {}
    for node in steps:
        for each in sharded.gradient_sums.get(node, ()):
            root = root_of(each.site.operands[each.number])
            earlier = sums[root][1] if root in sums else set()
            sums[root] = each, earlier | each.axes
    propagation, layout, why = sharded.propagation, sharded.layout, "gradients of partial sums"
    for each, axes in sums.values():
        node, number = each.site.node, each.number
        step, shape = steps[node], steps[node].operands[number]
        share, ref = step.source_share if number == 0 else 1.0, propagation.operands[node][number]
        elements = shape.elements / layout.shards_of(propagation.used(node)[number])
        scattered: set[str] = set()
        if isinstance(ref, Reshard):
            # The gradient is scattered over the axes over which the value was gathered.
            done = sharded.work.sample.resharded(ref.source, ref.target)
            scattered = axes & {m for op, mesh, _ in done if op == "all_gather" for m in mesh}
        for op, over in (("reduce_scatter", scattered), ("all_reduce", axes - scattered)):
            if over:
                mesh, rows = layout.ordered(over), shape.has_slots
                yield Collective(op, mesh, elements, why, "backward", share=share, in_route=rows,
                                 of_rows=rows)  # fmt: skip
                elements /= layout.size(mesh)


# Ways to the experts: the stages of a route, forward, again and transposed.


def _routed(
    layer: SparseLayer,
    way: Via,
    part: RowSlice | None,
    steps: Mapping[Node, StepParts],
    sharded: Sharded,
) -> Iterator[Collective]:
    """Yield the collectives on tokens and rows of a layer on a way to the experts and back.

    Args:
      layer: the layer.
      way: the way.
      part: the slice of a row that a device sends; None: whole rows.
      steps: the steps of the part that has the layer, by node.
      sharded: the part under its layout.
    """
    leaving_work = _stages_leaving_work(layer, way, steps)
    for stage in route(layer, way, sharded.propagation, part):
        step, shape = _subject(stage, layer, steps)
        for each in sent(stage.source, stage.steps):
            for is_transposed in (False, True):
                move = _moved(sharded, each, shape, "", "route", is_transposed=is_transposed)
                if move is None:
                    continue
                # Where all devices have all of a gradient, they take their part of it.
                takes_part = is_transposed and stage.value == "added" and each[0] == "all_gather"
                yield move._replace(
                    why=_why(stage, way, move.op),
                    step=None if is_transposed else step,
                    stream=each[1] if takes_part else (),
                    is_wide=stage.value == "gates",
                    leaves_work=(stage.value, move.op) in leaving_work,
                )
    if way.tokens_everywhere:
        yield from _gradients_of_rows(layer, steps, sharded)


def _stages_leaving_work(
    layer: SparseLayer, way: Via, steps: Mapping[Node, StepParts]
) -> Collection[tuple[str, str]]:
    """Return the stages, and their collectives, beside which a layer has products.

    Gathered tokens are routed again.  So while sums are scattered there is the routing of the
    device's own tokens, which losses read, and while gradients are, that of the router.  And the
    gradient of what experts add to tokens is that of what leaves the layer, if nothing else is done
    with it: a turn that computes the layer again begins with it.
    """
    if way.exchanges_rows:
        return ()
    stages = [("added", "reduce_scatter"), ("tokens", "reduce_scatter")]
    pending, seen = [layer.combine.node], set[Node]()
    while pending:
        users = {u for v in pending.pop().results for u in v.users if u in steps} - seen
        if not all(user.op.is_sum for user in users):
            return stages
        seen |= users
        pending.extend(users)
    return [*stages, ("added", "all_gather")]


def _gradients_of_rows(
    layer: SparseLayer, steps: Mapping[Node, StepParts], sharded: Sharded
) -> Iterator[Collective]:
    """Yield the collectives on gradients of rows, of which a device has its experts' own.

    All devices of the experts dispatch all rows, and gates that go with them.  Slots of fixed
    number are gathered from those that have their experts; as many as there are are packed
    otherwise on each device, and summed.
    """
    mesh = tuple(m for m in layer.expert_mesh if m not in layer.exchanged)
    op = "all_gather" if layer.rows.ragged is None else "all_reduce"
    dispatched = [(layer.dispatch.node, layer.rows, False)]
    if layer.gates is not None:
        dispatched.append((layer.gates.dispatch.node, layer.gates.sent, True))
    for node, type, is_gate in dispatched:
        shape = steps[node].results[0]
        if move := _moved(sharded, (op, mesh, type), shape, "gradients of rows", "route"):
            yield move._replace(is_wide=is_gate)


def _subject(
    stage: Stage, layer: SparseLayer, steps: Mapping[Node, StepParts]
) -> tuple[StepParts, GlobalShape]:
    """Return the step that makes the value of a stage, and its shape."""
    dispatch, combine = steps[layer.dispatch.node], steps[layer.combine.node]
    if stage.value == "tokens":
        return dispatch, dispatch.operands[0]
    if stage.value == "rows":
        return dispatch, dispatch.results[0]
    if stage.value == "gates":
        assert layer.gates is not None, "they are sent"
        gates = steps[layer.gates.dispatch.node]
        return gates, gates.results[0]
    if stage.value == "added":
        return combine, combine.results[0]
    maker = layer.combine.operands[0].node
    assert maker is not None, "experts make what is combined"
    return steps[maker], combine.operands[0]


_ROWS = {"all_gather": "parts of rows", "reduce_scatter": "sums of rows"}
_SLICES = {"all_gather": "parts of tokens", "reduce_scatter": "sums of tokens"}
_TOKENS = {"all_gather": "tokens to all experts", "reduce_scatter": "sums to their tokens"}


def _why(stage: Stage, way: Via, op: str) -> str:
    """Return the purpose of a collective, in a few words."""
    if op == "all_reduce":
        return "sums of all experts" if way.tokens_everywhere else "partial sums"
    if not way.exchanges_rows:
        is_gradient = stage.value == "added" and op == "all_gather"
        return "gradients to all experts" if is_gradient else _TOKENS.get(op, "")
    names = _ROWS if stage.value in ("rows", "made") else _SLICES
    return names.get(op, "rows to experts and back")


# Rows of a device on each way to the experts; the ways are the rows of `moecc.sharding.vias`.

SLICED = tuple(way.name for way in WAYS if way.is_sliced and not way.per_axis)
"""The ways that a plan tries in slices: devices that share neurons send a part of a row each."""

BOUND = 1.25
"""The capacity factor of an exchange whose experts take every token in the graph."""


@dataclass(frozen=True)
class LayerRows:
    """The tokens and rows of one device at one sparse layer.

    Attributes:
      tokens: tokens.
      rows: rows that the graph asks for, the padding of its capacity included.
      devices: of the experts' axes.
      top_k: choices of a token.
      experts: how many there are.
      dropless: whether every token is taken.
      in_rounds: whether a dropless exchange has as many rounds as its rows need.
    """

    tokens: float
    rows: float
    devices: int
    top_k: int
    experts: int
    dropless: bool
    in_rounds: bool = False

    def factor(self, name: str) -> float:
        """Return how many rows are computed for each row of the graph."""
        return 1.0 if is_exact(name, self.dropless) else BOUND

    def buffer_rows(self, name: str) -> float:
        """Return the rows that a device must have room for.

        Dropless, the worst case is that all choices of all devices fall on one: a token has at most
        one row for each expert there.  In rounds there is room for somewhat more than the mean.
        """
        way = via(name)
        if not self.dropless or way is None or way.is_bounded:
            return self.rows * self.factor(name)
        most = min(self.top_k, self.experts // self.devices)
        worst = self.tokens * most * (1 if way.tokens_everywhere else self.devices)
        return min(worst, ROUND_ROOM * self.rows) if self.in_rounds else worst


def is_exact(name: str, dropless: bool) -> bool:
    """Whether an exchange loses no row that the graph keeps."""
    way = via(name)
    return way is None or not (way.is_bounded and dropless)


def sparse_rows(part: Part, work: Workload, strategy: Strategy, local: Sharding) -> LayerRows:
    """Return the tokens and rows of a device at `part`, which has experts."""
    dispatched = (s for s in part.steps if s.moves is RowMove.TO_SLOTS)
    # Losses and metrics may send a number of each token, too.
    step = next(s for s in dispatched if "embed" in s.results[0].names)
    layout, rows = strategy.layout, step.results[0]
    embed = rows.size("embed")
    return LayerRows(
        tokens=local.values.elements(step.operands[0]) / embed,
        # Rows are counted where their tokens are, before any exchange.
        rows=rows.elements / embed / layout.shards["batch"],
        devices=layout.shards["expert"],
        top_k=part.top_k,
        experts=work.experts,
        dropless=work.dropless,
        in_rounds=strategy.in_rounds,
    )


# The costs of parts with their collectives.


class Kernel(NamedTuple):
    """A product of groups of rows, one for each expert of a device.

    Attributes:
      in_rounds: whether it is in the loop of the rounds of an exchange.
      experts: how many a device has.
    """

    in_rounds: bool
    experts: int


@dataclass(frozen=True)
class WeightProduct:
    """A product with a parameter, forward.

    Attributes:
      weight: the parameter.
      seconds: of its arithmetic; the gradients of both operands take as long each.
      is_first: whether no other product of its part is before it.
      kernel: the kernel that computes it, if one does.
      of_experts: whether the parameter is one of experts.
      result_seconds: to move its result through memory once.
      hbm_seconds: to read both operands and write the result.
    """

    weight: str
    seconds: float
    is_first: bool
    kernel: Kernel | None = None
    of_experts: bool = False
    result_seconds: float = 0.0
    hbm_seconds: float = 0.0

    @property
    def duration(self) -> float:
        """How many seconds it takes: of arithmetic and memory the slower."""
        return max(self.seconds, self.hbm_seconds)


@dataclass(frozen=True)
class PartCost:
    """The cost of the equal parts of one name, on one device, in one step.

    Attributes:
      name: of the part.
      count: how many there are.
      flops: FLOPs of all of them, forward, backward and again.
      hbm_bytes: what they read and write.
      compute_seconds: of the FLOPs.
      hbm_seconds: of the bytes.
      local_seconds: of both: of each operation the longer.
      collectives: of one part.
      chunks: number of parts in which rows are exchanged.
      in_layer: whether they are parts of layers.
      core_seconds: of the attention of one of them, forward, projections left out.
      products: yields those of one part with its parameters, forward; few estimates need them.
    """

    name: str
    count: int
    flops: float
    hbm_bytes: float
    compute_seconds: float
    hbm_seconds: float
    local_seconds: float
    collectives: tuple[Collective, ...] = ()
    chunks: int = 1
    in_layer: bool = True
    core_seconds: float = 0.0
    products: Callable[[], Iterable[WeightProduct]] = field(
        default=tuple, compare=False, repr=False
    )

    @property
    def waiting_seconds(self) -> float:
        """The collectives that nothing runs beside."""
        return self.network_seconds - self.hidden_seconds

    @property
    def hidden_seconds(self) -> float:
        """The collectives that run beside computation, as long as that lasts."""
        return self.count * sum(c.hidden_seconds for c in self.collectives)

    @property
    def network_seconds(self) -> float:
        """All collectives."""
        return self.count * sum(c.seconds for c in self.collectives)

    @property
    def seconds(self) -> float:
        """The time of the part."""
        return self.local_seconds + self.waiting_seconds

    def with_hidden(self, beside: Iterable[tuple[float, float]]) -> PartCost:
        """Return the part with what runs beside each of its collectives.

        Args:
          beside: of each, the share of its runs that something runs beside, and the seconds of all
            its runs that pass beside it.
        """
        hidden = (
            move._replace(beside=share, hidden_seconds=seconds)
            for move, (share, seconds) in zip(self.collectives, beside, strict=True)
        )
        return replace(self, collectives=tuple(hidden))

    def in_chunks(self) -> PartCost:
        """Return the part with exchanges of chunks hidden beside products of another.

        Link and products are two machines in a row, through which equal chunks go: the first chunk
        is waited for, and then the slower of both works without a pause (Johnson 1954).
        """
        if self.chunks == 1:
            return self
        rows = self.count * sum(c.seconds for c in self.collectives if c.is_exchange)
        local, share = self.local_seconds, 1 - 1 / self.chunks
        hidden = share * min(rows, local)
        return self.with_hidden(
            (max(c.beside, share), c.seconds * hidden / rows)
            if c.is_exchange
            else (c.beside, c.hidden_seconds)
            for c in self.collectives
        )

    @property
    def bound(self) -> str:
        """The resource that takes the most of its time, ``compute``, ``hbm`` or ``network``."""
        if self.network_seconds > self.local_seconds:
            return "network"
        return "hbm" if self.hbm_seconds > self.compute_seconds else "compute"
