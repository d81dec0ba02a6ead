"""The cost of a step under a strategy: arithmetic, memory traffic, collectives, time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

from moecc.ir.attention import AttentionFacts, KernelChoice, choose_attention
from moecc.ir.graph import Value
from moecc.ir.traits import Cost
from moecc.plan.collectives import (
    PARAMETERS,
    Collective,
    Kernel,
    PartCost,
    WeightProduct,
    is_exact,
    part_collectives,
    seconds,
    sent_bytes,
    sparse_rows,
)
from moecc.plan.machines import Machine, efficiency, efficiency_range
from moecc.plan.memory import Sharded, Sharding, StepMemory, Values, memory, optimizer_bytes
from moecc.plan.networks import Route
from moecc.plan.parts import Part, PlannedAttention, StepParts, passes_of_products
from moecc.plan.schedule import scheduled
from moecc.plan.step import StepConfig, Strategy
from moecc.plan.workload import Workload
from moecc.sharding.layout import Layout

EXPOSED_ERROR = 0.2
"""How far the exposed bytes of a plan are from those of compiled programs: within it in four of
five (``docs/proofs/exposed.json``)."""

SCORE_MOVES = 4.0
"""Passes of scores through memory where no kernel keeps them: made, read, weighed, read."""


@dataclass(frozen=True)
class Estimate:
    """The cost of a step.

    Attributes:
      strategy: what was chosen.
      memory: bytes of one device, by kind.
      parts: the cost by part.
      model_flops: what the model asks of all devices in a step, without recomputation or padding.
      machine: where.
      dtype: the type of the computation.
      attention: the kernels of attentions, each with the name of its part.
    """

    strategy: Strategy
    memory: StepMemory
    parts: tuple[PartCost, ...]
    model_flops: float
    machine: Machine
    dtype: str
    attention: tuple[tuple[str, KernelChoice], ...]

    @cached_property
    def seconds(self) -> float:
        """The time of a step."""
        return sum(part.seconds for part in self.parts)

    @cached_property
    def flops(self) -> float:
        """FLOPs of one device."""
        return sum(part.flops for part in self.parts)

    @property
    def mfu(self) -> float:
        """The model's FLOPs, as a share of what the machine could do in that time."""
        peak = self.machine.peak(self.dtype) * self.machine.devices
        return self.model_flops / (self.seconds * peak)

    @property
    def fits(self) -> bool:
        """Whether a device has the memory."""
        return self.memory.total <= self.machine.usable_bytes

    @cached_property
    def collectives(self) -> dict[str, dict[str, float]]:
        """Collectives by operation: how often, bytes of full tensors, bytes sent, seconds."""
        rows: dict[str, dict[str, float]] = {}
        for part in self.parts:
            for move in part.collectives:
                row = rows.setdefault(
                    move.op,
                    {"count": 0.0, "tensor_bytes": 0.0, "sent_bytes": 0.0, "seconds": 0.0},
                )
                times, devices = (
                    part.count * move.times,
                    self.strategy.layout.size(move.axes),
                )
                row["count"] += times
                row["tensor_bytes"] += times * move.tensor_bytes
                row["sent_bytes"] += times * sent_bytes(move.op, devices, move.tensor_bytes)
                row["seconds"] += part.count * move.seconds
        return rows

    @cached_property
    def interval(self) -> tuple[float, float]:
        """The least and the most time of a step.

        Products reach what was measured of large and of small ones, and exposed collectives are
        those of the plan within `EXPOSED_ERROR`.
        """
        expected, exposed = efficiency("compute"), self.seconds - self.by_kind["local"]

        def seconds(reached: float, share: float) -> float:
            local = (max(p.compute_seconds * expected / reached, p.hbm_seconds) for p in self.parts)
            return sum(local) + exposed * share

        slow, fast = efficiency_range()
        most = max(seconds(slow, 1 + EXPOSED_ERROR), self.seconds)
        return min(seconds(fast, 1 - EXPOSED_ERROR), self.seconds), most

    @cached_property
    def overlap(self) -> dict[str, dict[str, float]]:
        """By operation the ``overlapped_bytes`` of full tensors, and the ``exposed_bytes``."""
        rows: dict[str, dict[str, float]] = {}
        for part in self.parts:
            for move in part.collectives:
                size = part.count * move.times * move.tensor_bytes
                row = rows.setdefault(move.op, {"overlapped_bytes": 0.0, "exposed_bytes": 0.0})
                row["overlapped_bytes"] += size * move.beside
                row["exposed_bytes"] += size * (1 - move.beside)
        return rows

    @cached_property
    def by_kind(self) -> dict[str, float]:
        """The seconds of a step by what they are spent on; they add up to the step."""
        exposed = {True: 0.0, False: 0.0}
        for part in self.parts:
            for move in part.collectives:
                exposed[move.waits] += part.count * (move.seconds - move.hidden_seconds)
        local = sum(part.local_seconds for part in self.parts)
        return {"local": local, "exchange": exposed[True], "parameters": exposed[False]}


class Estimator:
    """Estimates strategies for one model, batch and machine."""

    def __init__(self, work: Workload, machine: Machine, config: StepConfig) -> None:
        self.work = work
        self.machine = machine
        self.config = config
        self._local: dict[tuple[Layout, float], Sharding] = {}
        self._sharded: dict[Layout, Sharded] = {}
        self._values: dict[tuple[Layout, float], Values] = {}

    def memory(self, strategy: Strategy) -> StepMemory:
        """Return the memory of a device."""
        local = self._sharding(strategy.layout, self._row_factor(strategy, buffer=True))
        return memory(self.work, self.config, strategy, local, self.machine.kind)

    def _sharding(self, layout: Layout, rows: float = 1.0) -> Sharding:
        """Return sizes on one device; those of one strategy serve the next."""
        key, values_key = (layout, rows), (layout.of_values, rows)
        if key not in self._local:
            values = self._values.setdefault(values_key, Values(layout.of_values, self.work, rows))
            sharded = self._sharded.setdefault(layout, Sharded(layout, self.work))
            self._local[key] = Sharding(sharded, values)
        return self._local[key]

    def _row_factor(self, strategy: Strategy, *, buffer: bool) -> float:
        """Return how many rows there are, or there is room for, by each row of the graph."""
        part = next((p for p in self.work.parts if p.is_sparse), None)
        if part is None:
            return 1.0
        rows = sparse_rows(part, self.work, strategy, self._sharding(strategy.layout))
        return rows.buffer_rows(strategy.via) / rows.rows if buffer else rows.factor(strategy.via)

    def estimate(self, strategy: Strategy, needed: StepMemory | None = None) -> Estimate:
        """Return what a step costs under `strategy`.

        Args:
          strategy: what is chosen.
          needed: its memory, where that is known already.
        """
        local = self._sharding(strategy.layout, self._row_factor(strategy, buffer=False))
        times, train = self.config.micro_batches, self.config.train
        parts: list[PartCost] = []
        for part in self.work.parts:
            # For a CPU, XLA moves out of the loop of micro-batches the gathers of parameters, but
            # for those of equal layers, which are in a loop of their own.  For TPUs and GPUs it
            # leaves all of them where they are.
            gathers = 1 if self.machine.kind == "cpu" and not part.in_layer else times
            # Without experts, of a strategy only the layout and the rematerialisation count.
            key = ("cost", id(part), strategy.remat)
            cost = partial(self._part, part, strategy, local)
            once = cost() if part.is_sparse else local.sharded.once(key, cost)
            parts.append(_repeated(once, times, gathers))
        if train:
            parts += (_repeated(x, times, times) for x in self._streams(strategy, local))
            parts.append(self._update(local))
        needed = self.memory(strategy) if needed is None else needed
        parts = scheduled(
            parts, self.machine, self._routes(local), needed,
            is_asked=self.config.overlap, recomputes=strategy.remat != "none",
        )  # fmt: skip
        frozen = times * self.work.frozen_flops if train else 0.0
        return Estimate(
            strategy=strategy,
            memory=needed,
            parts=tuple(parts),
            model_flops=(3 * times if train else 1) * self.work.model_flops - frozen,
            machine=self.machine,
            dtype=self.config.compute_type.name,
            attention=self._attention,
        )

    @cached_property
    def _attention(self) -> tuple[tuple[str, KernelChoice], ...]:
        pairs = ((part.name, self.kernel(step)) for part in self.work.parts for step in part.steps)
        return tuple(dict.fromkeys((name, kernel) for name, kernel in pairs if kernel is not None))

    @cached_property
    def _rates(self) -> tuple[float, float]:
        """FLOPs and bytes of memory per second that a device reaches in practice."""
        return (
            self.machine.peak(self.config.compute_type.name) * efficiency("compute"),
            self.machine.hbm_bytes_per_second * efficiency("hbm"),
        )

    def _part(self, part: Part, strategy: Strategy, local: Sharding) -> PartCost:
        width, rates = self.config.compute_type.itemsize_bytes, self._rates
        flops = hbm_bytes = compute = hbm = both = core = 0.0
        sizes = local.values.once(
            ("steps", id(part)),
            lambda: tuple(
                (_flops(s, local.values), _elements(s, local.values)) for s in part.steps
            ),
        )
        for step, (forward_flops, elements) in zip(part.steps, sizes, strict=True):
            # Forward, twice backward (or once), and again.
            passes = products = 1.0
            if self.config.train:
                again = step.computed_again(strategy.remat, strategy.in_rounds)
                passes = products = 1.0 + step.backward + again
            choice = self.kernel(step)
            if choice is not None and step.attention is not None:
                facts = self._facts(step.attention)
                products = passes_of_products(choice.kernel, facts, passes)
                if choice.kernel.moves_scores:
                    elements += SCORE_MOVES * local.values.elements(step.attention.scores)
            step_flops, step_bytes = forward_flops * products, elements * width
            times = (step_flops / rates[0], step_bytes * passes / rates[1])
            flops, hbm_bytes = flops + step_flops, hbm_bytes + step_bytes * passes
            compute, hbm, both = compute + times[0], hbm + times[1], both + max(times)
            core += max(times) / passes if step.attention is not None else 0.0
        return PartCost(
            name=part.name,
            count=part.count,
            flops=part.count * flops,
            hbm_bytes=part.count * hbm_bytes,
            compute_seconds=part.count * compute,
            hbm_seconds=part.count * hbm,
            local_seconds=part.count * both,
            collectives=self._timed(part_collectives(part, self.config, strategy, local), local),
            chunks=strategy.chunks if part.is_sparse else 1,
            in_layer=part.in_layer,
            core_seconds=core,
            products=partial(self._products, part, strategy, local.values),
        )

    def _products(self, part: Part, strategy: Strategy, values: Values) -> Iterator[WeightProduct]:
        """Yield the products of a part with its parameters, in order."""
        is_ragged = self.work.dropless and is_exact(strategy.via, dropless=True)
        experts = self.work.experts // strategy.layout.shards["expert"]
        kernel = Kernel(strategy.in_rounds, experts) if is_ragged else None
        behind, width = set[Value](), self.config.compute_type.itemsize_bytes
        for node, step in zip(part.nodes, part.steps, strict=True):
            is_behind = not behind.isdisjoint(node.operands)
            weight = next(filter(None, step.weights), None)
            if weight is not None and step.cost is Cost.PRODUCT:
                is_behind, is_first = True, not is_behind
                written = sum(map(values.elements, step.results))
                yield WeightProduct(
                    weight.name,
                    _flops(step, values) / self._rates[0],
                    is_first,
                    kernel=kernel if weight.of_experts else None,
                    of_experts=weight.of_experts,
                    result_seconds=written * width / self._rates[1],
                    hbm_seconds=_elements(step, values) * width / self._rates[1],
                )
            if is_behind:
                behind.update(node.results)

    def kernel(self, step: StepParts) -> KernelChoice | None:
        """Return the kernel of a step that is an attention; None for any other step."""
        return None if step.attention is None else choose_attention(self._facts(step.attention))

    def _facts(self, attention: PlannedAttention) -> AttentionFacts:
        """Return the facts of an attention, and of the program."""
        machine, dtype = self.machine, self.config.compute_type.name
        return replace(attention.facts, platform=machine.kind, dtype=dtype)

    def _timed(self, collectives: Iterable[Collective], local: Sharding) -> tuple[Collective, ...]:
        """Return collectives as the machine runs them, with their seconds."""
        routes, reached = self._routes(local), efficiency("network")
        run = (each.on(self.machine.kind) for each in collectives)
        return tuple(
            c._replace(seconds=c.times * seconds(c.op, routes[c.axes], c.tensor_bytes) / reached)
            for c in run
        )

    def _routes(self, local: Sharding) -> dict[tuple[str, ...], Route]:
        """Return the routes of the mesh's axes through the network."""
        sizes = local.layout.sizes
        return local.sharded.once("routes", lambda: self.machine.network.routes(sizes))

    def _streams(self, strategy: Strategy, local: Sharding) -> Iterator[PartCost]:
        """Yield the gathers of the activations between units, kept in parts.

        They are gathered for each unit forward and again, and their gradient behind the unit; and
        so are the output of the last unit of a stack and its gradient.
        """
        axis, width = strategy.stream_axis, self.config.compute_type.itemsize_bytes
        units: Counter[str] = Counter()
        for layer in self.work.layers:
            units[layer.name] += layer.count * layer.is_first
        for layer in self.work.layers if axis is not None else ():
            for shape in layer.inputs if layer.is_first else ():
                elements, times = local.values.elements(shape), 3 + 2 / units[layer.name]
                gather = Collective(
                    "all_gather", (str(axis),), elements, "what layers hand on",
                    tensor_bytes=elements * width, times=times,
                )  # fmt: skip
                each = self._timed([gather], local)
                yield PartCost(f"{layer.name}.stream", layer.count, 0.0, 0.0, 0.0, 0.0, 0.0, each)

    def _update(self, local: Sharding) -> PartCost:
        """Return the cost of the optimizer: parameters, gradients and state, read and written."""
        stored = sum(n * local.stored(w) for w, n in self.work.weights if w.trained)
        state = optimizer_bytes(self.work, self.config, local, self.machine.kind)
        moved = stored * self.config.weight_type.itemsize_bytes * 3 + 2 * state
        # A sum of gradients is read and written for each micro-batch after the first.
        moved += (
            stored * self.config.reduce_type.itemsize_bytes * 2 * (self.config.micro_batches - 1)
        )
        time = moved / (self.machine.hbm_bytes_per_second * efficiency("hbm"))
        return PartCost("optimizer", 1, 0.0, moved, 0.0, time, time, in_layer=False)


def _repeated(part: PartCost, times: int, gathers: int) -> PartCost:
    """Return the cost of a part in `times` micro-batches; parameters are gathered in `gathers`."""
    if times == 1:
        return part
    scaled = ("flops", "hbm_bytes", "compute_seconds", "hbm_seconds", "local_seconds")
    runs = ((c, gathers if c.why == PARAMETERS else times) for c in part.collectives)
    return replace(
        part,
        **{name: getattr(part, name) * times for name in scaled},
        collectives=tuple(
            c._replace(times=c.times * count, seconds=c.seconds * count) for c, count in runs
        ),
    )


def _flops(step: StepParts, values: Values) -> float:
    """Return the FLOPs of a step on one device, forward."""
    return 2.0 * step.cost.products * values.elements(step.axes) if step.cost.products else 0.0


def _elements(step: StepParts, values: Values) -> float:
    """Return the elements that a step reads and writes, forward."""
    if step.cost is Cost.FUSED:
        return 0.0
    # Of a table only the rows that are looked up.
    operands = step.results if step.cost is Cost.LOOK_UP else step.operands
    return sum(map(values.elements, [*operands, *step.results]))
