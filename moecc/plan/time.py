"""What a step costs under a strategy: arithmetic, memory traffic, collectives, time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from moecc.ir.attention import AttentionFacts, KernelChoice, choose_attention
from moecc.ir.traits import Cost
from moecc.plan.collectives import (
    Kernel,
    PartTransfers,
    Product,
    Transfer,
    overlap,
    products_of,
    seconds,
    sent_bytes,
)
from moecc.plan.machines import Machine, efficiency
from moecc.plan.memory import Memory, memory, optimizer_bytes
from moecc.plan.parts import Part, PlannedAttention, Step, passes_of_products
from moecc.plan.sharding import Sharded, Sharding, Values
from moecc.plan.step import StepConfig, Strategy
from moecc.plan.traffic import PARAMETERS, exact, part_transfers, sparse_rows
from moecc.plan.workload import Workload
from moecc.sharding.layout import Layout

BOUNDS = ("compute", "hbm", "network")

Products = Callable[[], Iterable[Product]]
"""Yields the products of a part."""

SCORE_MOVES = 4.0
"""How often scores go through memory where no kernel keeps them: made, read, weighed, read."""


@dataclass(frozen=True)
class PartCost:
    """The cost of the equal parts of one name, on one device, in one step.

    Attributes:
      name: of the part.
      count: how many there are.
      flops: FLOPs of all of them, forward, backward and again.
      hbm_bytes: what they read and write.
      compute_seconds: what the FLOPs take.
      hbm_seconds: what the bytes take.
      local_seconds: both: of each operation the longer.
      transfers: their collectives, with seconds, of one part.
      chunks: in how many parts rows are exchanged.
      in_layer: whether they are parts of layers.
      products: yields those of one part with its parameters, forward; few estimates need them.
    """

    name: str
    count: int
    flops: float
    hbm_bytes: float
    compute_seconds: float
    hbm_seconds: float
    local_seconds: float
    transfers: tuple[tuple[Transfer, float], ...]
    chunks: int = 1
    in_layer: bool = True
    products: Products = field(default=tuple, compare=False, repr=False)

    @property
    def waiting_seconds(self) -> float:
        """The collectives that computation waits for."""
        return self.count * sum(s for t, s in self.transfers if t.waits)

    @property
    def hidden_seconds(self) -> float:
        """The collectives of parameters and gradients, which run beside computation."""
        return self.count * sum(s for t, s in self.transfers if not t.waits)

    @property
    def network_seconds(self) -> float:
        """All collectives."""
        return self.waiting_seconds + self.hidden_seconds

    @property
    def seconds(self) -> float:
        """The time of the part: what is hidden counts where it is longer than what hides it."""
        alone = max(self.local_seconds, self.hidden_seconds) + self.waiting_seconds
        return alone - self.chunked_seconds

    @property
    def chunked_seconds(self) -> float:
        """What is spared by exchanging one chunk of rows beside the products of another.

        Link and products are two machines in a row, through which equal chunks go: the first chunk
        is waited for, and then the slower of both works without a pause (Johnson 1954).
        """
        exchanges = (s for t, s in self.transfers if t.waits and t.op.endswith("all_to_all"))
        rows, local = self.count * sum(exchanges), self.local_seconds
        chunked = (rows + local + (self.chunks - 1) * max(rows, local)) / self.chunks
        return rows + local - chunked

    @property
    def bound(self) -> str:
        """What takes the most of its time, one of `BOUNDS`."""
        if self.network_seconds > self.local_seconds:
            return "network"
        return "hbm" if self.hbm_seconds > self.compute_seconds else "compute"


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
    memory: Memory
    parts: tuple[PartCost, ...]
    model_flops: float
    machine: Machine
    dtype: str
    attention: tuple[tuple[str, KernelChoice], ...] = ()

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
        found: dict[str, dict[str, float]] = {}
        for part in self.parts:
            for transfer, each in part.transfers:
                row = found.setdefault(
                    transfer.op,
                    {"count": 0.0, "tensor_bytes": 0.0, "sent_bytes": 0.0, "seconds": 0.0},
                )
                times = part.count * transfer.times
                devices = self.strategy.layout.size(transfer.axes)
                row["count"] += times
                row["tensor_bytes"] += times * transfer.tensor_bytes
                row["sent_bytes"] += times * sent_bytes(transfer.op, devices, transfer.tensor_bytes)
                row["seconds"] += part.count * each
        return found

    def overlap(self, is_asked: bool) -> dict[str, dict[str, float]]:
        """Return the bytes of collectives beside products and those exposed, see `overlap`."""
        # A compiler prices links at their full rate.
        ideal = efficiency("network")
        parts = (
            PartTransfers(
                p.name.rpartition(".")[0],
                p.count,
                p.in_layer,
                [t for t, _ in p.transfers],
                [s * ideal / t.times for t, s in p.transfers],
                p.chunks,
                tuple(p.products()),
            )
            for p in self.parts
        )
        return overlap(self.machine, parts, is_asked)

    @cached_property
    def by_kind(self) -> dict[str, float]:
        """The seconds of a step by what they are spent on; they add up to the step."""
        compute = sum(p.local_seconds for p in self.parts)
        waiting = sum(p.waiting_seconds - p.chunked_seconds for p in self.parts)
        return {
            "local": compute,
            "exchange": waiting,
            "parameters": self.seconds - compute - waiting,
        }


class Estimator:
    """Estimates strategies for one model, batch and machine."""

    def __init__(self, work: Workload, machine: Machine, config: StepConfig) -> None:
        self.work = work
        self.machine = machine
        self.config = config
        self._local: dict[tuple[Layout, float], Sharding] = {}
        self._sharded: dict[Layout, Sharded] = {}
        self._values: dict[tuple[Layout, float], Values] = {}

    def memory(self, strategy: Strategy) -> Memory:
        """Return the memory of a device."""
        local = self._sharding(strategy.layout, self._row_factor(strategy, buffer=True))
        return memory(self.work, self.config, strategy, local, self.machine.kind)

    def _sharding(self, layout: Layout, rows: float = 1.0) -> Sharding:
        """Return sizes on one device; what is worked out for one strategy serves the next."""
        found = self._local.get((layout, rows))
        if found is None:
            key, work = (layout.of_values, rows), self.work
            sharded = self._sharded.setdefault(layout, Sharded(layout, work))
            found = Sharding(sharded, self._values.setdefault(key, Values(key[0], work, rows)))
            self._local[layout, rows] = found
        return found

    def _row_factor(self, strategy: Strategy, *, buffer: bool) -> float:
        """Return how many rows there are, or there is room for, by each row of the graph."""
        local = self._sharding(strategy.layout)
        part = next((p for p in self.work.parts if p.is_sparse), None)
        if part is None:
            return 1.0
        rows = sparse_rows(part, self.work, self.config, strategy, local)
        return rows.buffer_rows(strategy.via) / rows.rows if buffer else rows.factor(strategy.via)

    def estimate(self, strategy: Strategy, needed: Memory | None = None) -> Estimate:
        """Return what a step costs under `strategy`.

        Args:
          strategy: what is chosen.
          needed: its memory, where that is known already.
        """
        local = self._sharding(strategy.layout, self._row_factor(strategy, buffer=False))
        times = self.config.micro_batches
        parts = [
            _repeated(self._part(part, strategy, local), times, self._gathers_of(part))
            for part in self.work.parts
        ]
        if self.config.train:
            parts += (_repeated(x, times, times) for x in self._streams(strategy, local))
        if self.config.train:
            parts.append(self._update(local))
        passes = 3 * times if self.config.train else 1
        frozen = times * self.work.frozen_flops if self.config.train else 0.0
        return Estimate(
            strategy=strategy,
            memory=self.memory(strategy) if needed is None else needed,
            parts=tuple(parts),
            model_flops=passes * self.work.model_flops - frozen,
            machine=self.machine,
            dtype=self.config.compute_type.name,
            attention=self._attention,
        )

    @cached_property
    def _attention(self) -> tuple[tuple[str, KernelChoice], ...]:
        pairs = ((part.name, self.kernel(step)) for part in self.work.parts for step in part.steps)
        return tuple(dict.fromkeys((name, kernel) for name, kernel in pairs if kernel is not None))

    def _gathers_of(self, part: Part) -> int:
        """Return in how many micro-batches the parameters of a part are gathered.

        For a CPU, XLA moves out of their loop the gathers of what is the same in each of them, but
        for those of equal layers, which are in a loop of their own.  For TPUs and GPUs it leaves
        all of them where they are.
        """
        return 1 if self.machine.kind == "cpu" and not part.in_layer else self.config.micro_batches

    def _part(self, part: Part, strategy: Strategy, local: Sharding) -> PartCost:
        if part.is_sparse:
            return self._cost(part, strategy, local)
        # Without experts, of a strategy only the layout and what is computed again count.
        key = ("cost", id(part), strategy.remat)
        return local.sharded.once(key, lambda: self._cost(part, strategy, local))

    @cached_property
    def _rates(self) -> tuple[float, float]:
        """FLOPs and bytes of memory per second that a device reaches in practice."""
        return (
            self.machine.peak(self.config.compute_type.name) * efficiency("compute"),
            self.machine.hbm_bytes_per_second * efficiency("hbm"),
        )

    def _cost(self, part: Part, strategy: Strategy, local: Sharding) -> PartCost:
        width, rates = self.config.compute_type.itemsize_bytes, self._rates
        flops = moved = compute = hbm = both = 0.0
        sizes = local.values.once(("steps", id(part)), lambda: _step_sizes(part, local.values))
        for step, (each, elements) in zip(part.steps, sizes, strict=True):
            passes = _passes(step, strategy, self.config)
            elements += self._score_elements(step, local.values)
            work, bytes_ = each * self._work(step, passes), elements * width
            times = (work / rates[0], bytes_ * passes / rates[1])
            flops, moved = flops + work, moved + bytes_ * passes
            compute, hbm, both = compute + times[0], hbm + times[1], both + max(times)
        found = part_transfers(part, self.config, strategy, local)
        return PartCost(
            name=part.name,
            count=part.count,
            flops=part.count * flops,
            hbm_bytes=part.count * moved,
            compute_seconds=part.count * compute,
            hbm_seconds=part.count * hbm,
            local_seconds=part.count * both,
            transfers=self._timed(found, local),
            chunks=strategy.chunks if part.is_sparse else 1,
            in_layer=part.in_layer,
            products=self._products(part, strategy, local.values),
        )

    def _products(self, part: Part, strategy: Strategy, values: Values) -> Products:
        rate, ragged = self._rates[0], self.work.dropless and exact(strategy.via, dropless=True)
        experts = self.work.experts // strategy.layout.shards["expert"]
        kernel = Kernel(strategy.in_rounds, experts) if ragged else None
        return lambda: products_of(part, lambda step: _step_flops(step, values) / rate, kernel)

    def _work(self, step: Step, passes: float) -> float:
        """Return how often all products of a step are computed, in `passes` over its arrays."""
        if step.attention is None:
            return passes
        facts = self._facts(step.attention)
        return passes_of_products(choose_attention(facts).kernel, facts, passes)

    def kernel(self, step: Step) -> KernelChoice | None:
        """Return the kernel of a step that is an attention; None for any other step."""
        return None if step.attention is None else choose_attention(self._facts(step.attention))

    def _facts(self, attention: PlannedAttention) -> AttentionFacts:
        """Return what is known of an attention, and of the program."""
        machine, dtype = self.machine, self.config.compute_type.name
        on_mesh = machine.devices > 1
        return replace(attention.facts, platform=machine.kind, dtype=dtype, on_mesh=on_mesh)

    def _score_elements(self, step: Step, values: Values) -> float:
        """Return the elements of scores that an attention reads and writes, forward."""
        choice = self.kernel(step)
        if choice is None or step.attention is None or not choice.kernel.moves_scores:
            return 0.0
        return SCORE_MOVES * values.elements(step.attention.scores)

    def _timed(
        self, found: Iterable[Transfer], local: Sharding
    ) -> tuple[tuple[Transfer, float], ...]:
        """Return collectives with the seconds that they take."""
        sizes, reached = local.layout.sizes, efficiency("network")
        routes = local.sharded.once("routes", lambda: self.machine.network.routes(sizes))
        return tuple(
            (t, t.times * seconds(t.op, routes[t.axes], t.tensor_bytes) / reached)
            for t in (each.on(self.machine.kind) for each in found)
        )

    def _streams(self, strategy: Strategy, local: Sharding) -> Iterator[PartCost]:
        """Yield what gathers the stream that goes from unit to unit, kept in parts.

        It is gathered for each unit forward and again, and its gradient behind the unit; and so are
        what leaves the last unit of a stack and its gradient.
        """
        axis, width = strategy.stream_axis, self.config.compute_type.itemsize_bytes
        units: Counter[str] = Counter()
        for layer in self.work.layers:
            units[layer.name] += layer.count * layer.is_first
        for layer in self.work.layers if axis is not None else ():
            for shape in layer.inputs if layer.is_first else ():
                size, each = local.elements(shape) * width, 3 + 2 / units[layer.name]
                found = Transfer("all_gather", (str(axis),), size, each, "what layers hand on")
                times = self._timed([found], local)
                yield PartCost(f"{layer.name}.stream", layer.count, 0.0, 0.0, 0.0, 0.0, 0.0, times)

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
        return PartCost("optimizer", 1, 0.0, moved, 0.0, time, time, ())


def _repeated(part: PartCost, times: int, gathers: int) -> PartCost:
    """Return the cost of a part in a step of `times` micro-batches.

    Its parameters are gathered in `gathers` of them.
    """
    if times == 1:
        return part
    return replace(
        part, flops=part.flops * times, hbm_bytes=part.hbm_bytes * times,
        compute_seconds=part.compute_seconds * times, hbm_seconds=part.hbm_seconds * times,
        local_seconds=part.local_seconds * times,
        transfers=tuple(
            (t._replace(times=t.times * each), s * each)
            for t, s in part.transfers
            for each in [gathers if t.why == PARAMETERS else times]
        ),
    )  # fmt: skip


def _passes(step: Step, strategy: Strategy, config: StepConfig) -> float:
    """Return how often a step's work is done: forward, twice backward (or once), again."""
    if not config.train:
        return 1.0
    return 1.0 + step.backward + step.computed_again(strategy.remat, strategy.in_rounds)


def _step_sizes(part: Part, values: Values) -> tuple[tuple[float, float], ...]:
    """Return the FLOPs of each step of a part, forward, and the elements that it moves."""
    return tuple((_step_flops(step, values), _step_elements(step, values)) for step in part.steps)


def _step_flops(step: Step, values: Values) -> float:
    return 2.0 * step.cost.products * values.elements(step.axes) if step.cost.products else 0.0


def _step_elements(step: Step, values: Values) -> float:
    """Return the elements that a step reads and writes, forward."""
    if step.cost is Cost.FUSED:
        return 0.0
    shapes = [*step.operands, *step.results]
    if step.cost is Cost.LOOK_UP:
        # Of the table only the rows that are looked up.
        shapes = [*step.results, *step.results]
    return sum(map(values.elements, shapes))
