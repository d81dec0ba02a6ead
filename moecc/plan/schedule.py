"""The parts of a step with their costs, and which collectives compilers run beside products.

A compiler decides it when it schedules.  It is foreseen here for those whose schedules were read
(`moecc compile` reads that of every program).  A turn of a loop over layers is products one after
the other.  Collectives outside of the loops are exposed: embedding and head, and gradients of
parameters that are stored whole, which are added up first.

* XLA for GPUs hides latency by itself where it has estimates of it (`LayerSchedule`).
* XLA for TPUs has a gather in a product where it is asked to (`shares_on_tpu`).
* XLA for CPUs, and for TPUs by default, waits for every collective.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from moecc.plan.collectives import Collective, PartCost, WeightProduct
from moecc.plan.machines import Machine, efficiency, table
from moecc.plan.memory import StepMemory
from moecc.plan.networks import Route, TwoLevelRoute

ASKED = ("tpu:v5p",)
"""Machines whose compilers overlap if they are asked to, by the beginning of their names."""

# Which collectives of a step are beside products.


def scheduled(
    parts: Sequence[PartCost],
    machine: Machine,
    routes: Mapping[tuple[str, ...], Route],
    memory: StepMemory,
    *,
    is_asked: bool,
    recomputes: bool,
) -> list[PartCost]:
    """Return the parts of a step with what their collectives run beside.

    Args:
      parts: of a step.
      machine: where.
      routes: of its network, by mesh axes.
      memory: what the step needs.
      is_asked: whether the compiler is asked to have collectives beside products.
      recomputes: whether the backward pass computes layers again.
    """
    name = machine.compiled_as or machine.name
    rates = scheduler_rates(name)
    room = MEMORY_SLOP * (MEMORY_SHARE * machine.usable_bytes - memory.arguments)
    if rates is not None and memory.temporaries > room:
        return list(parts)
    if rates is None and not (is_asked and name.startswith(ASKED)):
        return list(parts)
    layers: dict[str, list[int]] = {}
    for number, part in enumerate(parts):
        if part.in_layer:
            layers.setdefault(part.name.rpartition(".")[0], []).append(number)
    result = list(parts)
    for numbers in layers.values():
        layer = [parts[number] for number in numbers]
        hidden: Iterable[PartCost]
        if rates is None:
            hidden = map(_beside_on_tpu, layer, shares_on_tpu(layer, recomputes=recomputes))
        else:
            latencies = latencies_of(layer, rates, routes, machine.devices)
            inside = {
                axes
                for axes, route in routes.items()
                if isinstance(route, TwoLevelRoute) and route.within.devices == route.devices
            }
            each = LayerSchedule(layer, latencies, inside, recomputes).parts()
            hidden = (part.in_chunks() for part in each)
        for number, part in zip(numbers, hidden, strict=True):
            result[number] = part
    return result


def _beside_on_tpu(part: PartCost, shares: Sequence[float]) -> PartCost:
    """Return a part whose collectives are beside its own products, as far as these last."""
    beside = [c.seconds * share for c, share in zip(part.collectives, shares, strict=True)]
    total = part.count * sum(beside)
    scale = min(part.local_seconds / total, 1.0) if total else 0.0
    return part.with_hidden(
        (share, seconds * scale) for share, seconds in zip(shares, beside, strict=True)
    )


# XLA's latency hiding scheduler for GPUs orders a turn of a loop from its end.  One collective is
# on its way at a time.  Of what can stand next, the end of a collective comes first if none is on
# its way, then what causes the least stall, then the beginning of a collective if another waits for
# its place, then what has the longest collectives before it.  A collective begins when its
# estimated time has passed, or when nothing else is left to run.  All of this was read
# from its log (``TF_CPP_VMODULE=latency_hiding_scheduler=6,sol_latency_estimator=10``,
# jax's CUDA plug-in 0.10.2), and the resulting orders from compiled programs.
#
# The scheduler holds that cuDNN's attention, or a loop such as the rows of dropless experts,
# takes no time.  So what runs beside one is hidden, but nothing is planned to be.  Gradients are
# reduced in the turn after the one that computes them, wherever there is a place.

MEMORY_SHARE, MEMORY_SLOP = 0.8, 0.95
"""The share of a GPU's memory that XLA schedules for, and the share of what arguments leave of it
that temporaries may have; a program that needs more has no collective beside a product."""

SMALL_SECONDS = 2e-5
"""The scheduler's estimate for a norm or a sum, of which some stand between products."""

COMBINED_BYTES = 30 << 20
"""The most that collectives over the same devices have together where XLA makes them one."""

COMBINED_GRADIENT_BYTES = 512e6
"""The most of reductions of gradients, those of experts excepted."""

BETWEEN, BETWEEN_GRADIENTS = 1.5, 3.0
"""How often results of products go through memory until the next product reads them: of a gate and
its neurons both are read, and a product of them written; backward about twice as much."""

COUNTS_SECONDS = 1.6e-4
"""Its estimate for the collectives that agree on the rounds of an exchange: launch and latency."""


class SchedulerRates(NamedTuple):
    """The scheduler's estimate of a collective, as ``machines.json`` has it.

    Attributes:
      launch_seconds: to begin one.
      chunk_seconds: to prepare a chunk.
      chunk_bytes: of a chunk.
      hop_seconds: between two nodes.
      outer_seconds_per_byte: from one GPU to another node.
      inner_bytes_per_second: within a node.
      inner_seconds: within a node, whatever the size.
      node: GPUs of a node.
    """

    launch_seconds: float
    chunk_seconds: float
    chunk_bytes: float
    hop_seconds: float
    outer_seconds_per_byte: float
    inner_bytes_per_second: float
    inner_seconds: float
    node: int

    def seconds(self, move: Collective, route: Route, devices: int) -> float:
        """Return the estimate for one run of `move` on a machine of so many `devices`.

        Between nodes it is that of a ring (NCCL's): each of n GPUs passes n − 1 parts on, and the
        GPUs of one node have a link each.  A group that is not all devices counts each of its
        members as a node, and the groups share the links of a node.
        """
        assert isinstance(route, TwoLevelRoute), "GPUs are in nodes"
        size, inner = move.tensor_bytes, route.within.devices
        if route.devices == inner:
            return self.inner_seconds + size / self.inner_bytes_per_second
        groups = devices // route.devices
        nodes = route.devices // self.node if groups == 1 else route.devices
        members = max(nodes * self.node // groups, nodes)
        each = members // nodes
        is_exchange = move.op.endswith("all_to_all")
        part = size / (members - 1 if is_exchange else members)
        chunks = -(-part // self.chunk_bytes)
        hop = part * self.outer_seconds_per_byte + chunks * self.chunk_seconds + self.hop_seconds
        hops = each * (nodes - 1) if is_exchange else (members - 1) / each
        return self.launch_seconds + hop * hops * (2 if move.op == "all_reduce" else 1)


def scheduler_rates(machine: str) -> SchedulerRates | None:
    """Return the estimates of the compiler for a machine; None if it hides nothing."""
    kind, _, chip = machine.partition(":")
    row = table().get(kind, {}).get(chip.partition(":")[0], {})
    stated = row.get("scheduler") if isinstance(row, dict) else None
    return None if stated is None else SchedulerRates(node=row["gpus_per_node"], **stated)


class Hiding(NamedTuple):
    """How a run of a collective stands in the schedule.

    Attributes:
      beside: whether something that multiplies runs beside it.
      seconds: what runs beside it, as the plan times it.
    """

    beside: bool
    seconds: float


@dataclass(eq=False)
class Task:
    """Something of a turn that the scheduler puts in order.

    Attributes:
      cost: the scheduler's estimate, of a collective 0.
      seconds: the plan's.
      latency: of a collective, the scheduler's estimate; None for what computes.
      waits_for: what has to be done before.
      moves: of a collective, what it combines, by numbers in the layer.
    """

    cost: float = 0.0
    seconds: float = 0.0
    latency: float | None = None
    waits_for: list[Task] = field(default_factory=list)
    moves: tuple[int, ...] = ()


def hide(tasks: Sequence[Task]) -> dict[Task, Hiding]:
    """Return what runs beside each collective of a turn.

    Args:
      tasks: of the turn, each after those that it waits for.
    """
    pending: dict[Task, int] = defaultdict(int)
    depth: dict[Task, float] = {}
    for task in tasks:
        depth[task] = (task.latency or 0.0) + max((depth[t] for t in task.waits_for), default=0.0)
        for before in task.waits_for:
            pending[before] += 1
    order = {task: number for number, task in enumerate(tasks)}
    ready = {task: 0.0 for task in tasks if not pending[task]}
    hidings: dict[Task, Hiding] = {}
    now, on_its_way, begins, beside = 0.0, None, 0.0, list[Task]()

    def finish(task: Task) -> None:
        for before in task.waits_for:
            pending[before] -= 1
            if not pending[before]:
                ready[before] = now

    while ready or on_its_way is not None:
        waiting = [t for t in ready if t.latency is not None]
        if waiting and on_its_way is None:
            done = max(waiting, key=lambda t: (depth[t], order[t]))
            now = max(now, ready.pop(done))
            on_its_way, begins, beside = done, now + (done.latency or 0.0), []
            continue
        free = [t for t in ready if t.latency is None]
        if on_its_way is not None:
            stall = max(begins - now, 0.0)
            if not free or (stall == 0.0 and waiting):
                now = max(now, begins)
                computed = [t for t in beside if t.seconds]
                hidings[on_its_way] = Hiding(bool(computed), sum(t.seconds for t in computed))
                task, on_its_way = on_its_way, None
                finish(task)
                continue
        task = max(free, key=lambda t: (depth[t], order[t]))
        del ready[task]
        now += task.cost
        if on_its_way is not None:
            beside.append(task)
        finish(task)
    return hidings


# The tasks of a turn, forward and backward, from the parts of a layer.


@dataclass
class Turn:
    """The tasks of a turn, as they are made.

    Attributes:
      tasks: in order.
      gathered: the gathers, each of which a turn has once.
      values: what the next task waits for.
    """

    tasks: list[Task] = field(default_factory=list)
    gathered: dict[tuple[int, ...], Task] = field(default_factory=dict)
    values: list[Task] = field(default_factory=list)

    def add(self, task: Task) -> Task:
        """Add a task."""
        self.tasks.append(task)
        return task


class LayerSchedule:
    """The collectives of a layer as XLA for GPUs runs them.

    Args:
      layer: the parts of a layer.
      latencies: the scheduler's estimate for a run of each collective of each part, and how much of
        it is in proportion to the bytes.
      within_node: the mesh axes whose devices are in one node.
      recomputes: whether a turn backward computes the layer again.
    """

    def __init__(
        self,
        layer: Sequence[PartCost],
        latencies: Sequence[Sequence[tuple[float, float]]],
        within_node: Collection[tuple[str, ...]],
        recomputes: bool,
    ) -> None:
        self._parts = [(part, tuple(part.products())) for part in layer]
        self._moves = [move for part in layer for move in part.collectives]
        self._latencies = [each for part in latencies for each, _ in part]
        self._sized = [sized for part in latencies for _, sized in part]
        self._numbers = self._by_part(layer)
        self._recomputes = recomputes
        experts = {p.weight for _, each in self._parts for p in each if p.of_experts}
        # Within a node, XLA combines the gradients of the neurons' first products by themselves.
        neurons = {p.weight for _, each in self._parts[1:] for p in each if p.is_first}

        def is_apart(move: Collective) -> bool:
            return move.weight in neurons and move.axes in within_node

        def limit(move: Collective) -> float:
            return COMBINED_BYTES if move.weight in experts else COMBINED_GRADIENT_BYTES

        self._gathers = _combined(self._moves, is_gather, lambda move: (COMBINED_BYTES, False))
        self._reductions = _combined(
            self._moves, is_reduction, lambda move: (limit(move), is_apart(move))
        )

    @staticmethod
    def _by_part(layer: Sequence[PartCost]) -> list[range]:
        numbers, first = [], 0
        for part in layer:
            numbers.append(range(first, first + len(part.collectives)))
            first += len(part.collectives)
        return numbers

    def forward(self) -> defaultdict[int, list[Hiding]]:
        """Return for each collective how its runs in a turn forward stand."""
        turn = Turn()
        for number in range(len(self._parts)):
            self._part(turn, number, has_tail=True)
        return self._result(turn)

    def backward(self) -> defaultdict[int, list[Hiding]]:
        """Return for each collective how its runs in a turn backward stand."""
        turn = Turn()
        again: list[list[Task]] = [[] for _ in self._parts]
        for numbers in self._reductions:
            turn.add(Task(latency=self._latency(numbers), moves=numbers))
        if self._recomputes:
            for number in range(len(self._parts)):
                again[number] = self._part(turn, number, has_tail=number < len(self._parts) - 1)
        turn.values = []
        for number in reversed(range(len(self._parts))):
            self._gradients(turn, number, again[number])
        return self._result(turn)

    def parts(self) -> Iterator[PartCost]:
        """Yield the parts of the layer with what runs beside their collectives."""
        forward, backward = self.forward(), self.backward()
        for (part, _), numbers in zip(self._parts, self._numbers, strict=True):
            yield part.with_hidden(
                _hidden(self._moves[number], forward[number] + backward[number])
                for number in numbers
            )

    def _result(self, turn: Turn) -> defaultdict[int, list[Hiding]]:
        result: defaultdict[int, list[Hiding]] = defaultdict(list)
        for task, hiding in hide(turn.tasks).items():
            sizes = {number: self._moves[number].tensor_bytes for number in task.moves}
            for number, size in sizes.items():
                share = hiding.seconds * size / sum(sizes.values())
                result[number].append(hiding._replace(seconds=share))
        return result

    def _latency(self, numbers: Sequence[int]) -> float:
        """Return the estimate for a combined collective, which is launched once."""
        each = [self._latencies[number] for number in numbers]
        shares = (self._sized[number] for number in numbers)
        return sum(shares) + max(e - self._sized[n] for e, n in zip(each, numbers, strict=True))

    def _gather(self, turn: Turn, weight: str) -> list[Task]:
        """Return the gather that a parameter is part of, if it is gathered."""
        for numbers in self._gathers:
            if any(self._moves[number].weight == weight for number in numbers):
                if numbers not in turn.gathered:
                    task = Task(latency=self._latency(numbers), moves=numbers)
                    turn.gathered[numbers] = turn.add(task)
                return [turn.gathered[numbers]]
        return []

    def _wait(self, turn: Turn, number: int, where: str) -> None:
        """Add the collectives that values wait for, before, amid or behind the products of a part.

        A copy or a sum stands on either side of each.
        """
        for at in self._numbers[number]:
            move = self._moves[at]
            if move.weight or _place(move) != where:
                continue
            for task in (
                Task(cost=SMALL_SECONDS),
                Task(latency=self._latencies[at], moves=(at,)),
                Task(cost=SMALL_SECONDS),
            ):
                task.waits_for = turn.values
                turn.values = [turn.add(task)]

    def _part(self, turn: Turn, number: int, *, has_tail: bool) -> list[Task]:
        """Add a part forward, without `has_tail` but its last product; return what it computes."""
        part, products = self._parts[number]
        computed: list[Task] = []
        self._wait(turn, number, "before")
        stages = _stages(products)
        for stage, group in enumerate(stages):
            if not has_tail and stage == len(stages) - 1 and stage:
                break
            if stage == 1:
                if part.core_seconds:
                    turn.values = [turn.add(Task(0.0, part.core_seconds, waits_for=turn.values))]
                self._wait(turn, number, "amid")
            tasks = self._products(turn, group, turn.values)
            computed += tasks
            turn.values = [turn.add(_between(group, tasks, BETWEEN))]
        else:
            self._wait(turn, number, "amid")
            self._wait(turn, number, "behind")
        return computed

    def _products(
        self, turn: Turn, group: Sequence[WeightProduct], values: list[Task]
    ) -> list[Task]:
        """Add products that may run in any order; those in rounds are one loop."""
        gathers = [self._gather(turn, product.weight) for product in group]
        if any(p.kernel is not None and p.kernel.in_rounds for p in group):
            counts = turn.add(Task(latency=COUNTS_SECONDS, waits_for=values))
            waits = [counts, *(task for each in gathers for task in each)]
            return [turn.add(Task(0.0, sum(p.duration for p in group), waits_for=waits))]
        return [
            turn.add(_product(product, [*values, *each]))
            for product, each in zip(group, gathers, strict=True)
        ]

    def _gradients(self, turn: Turn, number: int, again: list[Task]) -> None:
        """Add a part backward: of each product the gradients of its value and its parameter."""
        part, products = self._parts[number]
        stages = _stages(products)
        self._wait(turn, number, "behind")
        self._wait(turn, number, "amid")
        for stage in reversed(range(len(stages))):
            group = stages[stage]
            of_rows = self._products(turn, group, [*turn.values, *again])
            for product in group:
                if product.kernel is None or not product.kernel.in_rounds:
                    turn.add(_product(product, [*turn.values, *again]))
            turn.values = [turn.add(_between(group, of_rows, BETWEEN_GRADIENTS))]
            if stage == 1:
                self._wait(turn, number, "amid")
                if part.core_seconds:
                    core = Task(0.0, 2 * part.core_seconds, waits_for=turn.values)
                    turn.values = [turn.add(core)]
        self._wait(turn, number, "before")


def _hidden(move: Collective, hidings: Sequence[Hiding]) -> tuple[float, float]:
    """Return the share of the runs of a collective that are beside something, and for how long."""
    # Gradients that are not scattered are added up first, and reduced behind the loop.
    if not hidings or (move.weight and move.op == "all_reduce"):
        return 0.0, 0.0
    run = move.seconds / move.times
    seconds = sum(min(hiding.seconds, run) for hiding in hidings if hiding.beside)
    share = sum(hiding.beside for hiding in hidings) / len(hidings)
    return share, seconds / len(hidings) * move.times


def is_awaited(move: Collective) -> bool:
    """Whether layers wait for it, or it runs behind their loop."""
    return move.waits or move.op == "all_reduce"


def is_gather(move: Collective) -> bool:
    """Whether it gathers a parameter."""
    return move.op == "all_gather" and not move.waits


def is_reduction(move: Collective) -> bool:
    """Whether it reduces the gradient of a parameter, in a loop over layers."""
    return move.op == "reduce_scatter" and not move.waits


def _combined(
    moves: Sequence[Collective],
    is_wanted: Callable[[Collective], bool],
    rule: Callable[[Collective], tuple[float, bool]],
) -> list[tuple[int, ...]]:
    """Return the numbers of collectives that XLA combines.

    Args:
      moves: of a layer.
      is_wanted: whether a collective is one of those to combine.
      rule: returns the most bytes that are combined, and whether a collective is in a group apart.
    """
    groups: dict[tuple[tuple[str, ...], tuple[float, bool]], list[list[int]]] = {}
    for number, move in enumerate(moves):
        if not is_wanted(move):
            continue
        most, _ = key = rule(move)
        of_axes = groups.setdefault((move.axes, key), [[]])
        if sum(moves[n].tensor_bytes for n in of_axes[-1]) + move.tensor_bytes > most:
            of_axes.append([])
        of_axes[-1].append(number)
    return [tuple(group) for each in groups.values() for group in each if group]


def _product(product: WeightProduct, waits_for: list[Task]) -> Task:
    cost = 0.0 if product.kernel is not None else product.seconds
    return Task(cost, product.duration, waits_for=waits_for)


def _between(group: Sequence[WeightProduct], waits_for: list[Task], times: float) -> Task:
    """Return what stands between products, which takes time and does not multiply."""
    return Task(times * sum(p.result_seconds for p in group) + SMALL_SECONDS, waits_for=waits_for)


def _stages(products: Sequence[WeightProduct]) -> list[list[WeightProduct]]:
    """Return the products of a part in stages: those of its input, those between, the last."""
    first = [p for p in products if p.is_first]
    behind = [p for p in products if not p.is_first]
    if any(p.kernel is not None and p.kernel.in_rounds for p in behind):
        return [first, behind]
    return [stage for stage in (first, behind[:-1], behind[-1:]) if stage]


def _place(move: Collective) -> str:
    """Return where values wait for a collective: before the products of a part, amid, behind."""
    if move.op.endswith("all_to_all"):
        return "amid"
    return "before" if move.op == "all_gather" else "behind"


def latencies_of(
    layer: Sequence[PartCost],
    rates: SchedulerRates,
    routes: Mapping[tuple[str, ...], Route],
    devices: int,
) -> list[list[tuple[float, float]]]:
    """Return the scheduler's estimates for the collectives of each part of a layer.

    Each is one of the whole, and one of what is in proportion to the bytes.
    """

    def pair(move: Collective) -> tuple[float, float]:
        seconds = rates.seconds(move, routes[move.axes], devices)
        small = rates.seconds(move._replace(tensor_bytes=1.0), routes[move.axes], devices)
        return seconds, seconds - small

    return [[pair(move) for move in part.collectives] for part in layer]


# XLA for TPUs schedules a turn of a loop over layers from its end (latency hiding).  One gather is
# on its way at a time: it ends before the product that reads it, begins where the next one,
# towards the beginning of the turn, has to end, and is fused with a product between, if there is
# one.  So it has the last of the products before its reader that has no gather yet.  A reduction
# of gradients is for the cores that a chip has for embeddings, which do one at a time: nothing in
# the turn waits for it, so it goes to the end, beside products that nothing waits for either, as
# many as last as long.  Those are the gradients of the layer's input; and the gradient of a
# weight, once its own reduction has a place behind it.
#
# The reductions with the longest chains of transfers before them are the last; of equal chains the
# largest.
#
# Products of experts without a capacity are kernels, and the gradients of their parameters loops
# over rows.  XLA does not see inside of a kernel, and fuses no gather with it.  Rounds of an
# exchange are one loop for all experts and products, before which all their parameters have to be
# there, and beside which nothing is reduced.  Other kernels follow on one another: each ends the
# gather of its parameter, so that the one behind it is on its way beside a kernel, and exposed.
# Where they are computed again, parameters are copied, too, for the transposed products, which
# does not wait for tokens: where these are gathered for longer than a parameter, it is copied
# before they are there, and its kernel ends no gather.  The gradient that the loop of one expert
# makes is copied before it is reduced, for as long as another is reduced; a loop for each of
# several experts leaves nothing to copy, and the next gradient is reduced beside it.


def exposed_gathers(
    products: Sequence[WeightProduct],
    gathered: Collection[str],
    early: Collection[str] = (),
    others: Iterable[str] = (),
) -> set[str]:
    """Return the parameters that are gathered beside no product.

    Args:
      products: of a turn, forward, in order.
      gathered: the parameters that are gathered.
      early: those that have to be there before the values that the kernels that read them wait for.
      others: other gathers, which have to end before any kernel.
    """
    waiting, exposed = deque[str](), set[str]()
    for product in reversed(products):
        is_gathered = product.weight in gathered
        if product.kernel is None:
            waiting.extend(others)
            others = ()
            if waiting:
                waiting.popleft()
        elif waiting and is_gathered and not (product.kernel.in_rounds or product.weight in early):
            exposed.add(waiting.popleft())
        if is_gathered:
            waiting.append(product.weight)
    return exposed.union(waiting, others)


def exposed_gradients(
    products: Sequence[WeightProduct], seconds: Mapping[str, float], begins: int
) -> set[str]:
    """Return the parameters whose gradients are reduced beside no product.

    Args:
      products: of a turn, forward, in order.
      seconds: of the reduction of each gradient, the last of a turn first.
      begins: how many products read the input of the first, before all others.
    """
    free = deque(product.seconds for product in reversed(products[:begins]))
    by_weight = {product.weight: product for product in products}
    exposed = set[str]()
    for product in (by_weight[weight] for weight in seconds if weight in by_weight):
        if not free:
            exposed.add(product.weight)
        left = seconds[product.weight]
        while free and left > 0:
            left -= free.popleft()
        if product.kernel is None or (product.kernel.experts > 1 and not product.kernel.in_rounds):
            free.append(product.seconds)
    return exposed


def shares_on_tpu(layer: Sequence[PartCost], *, recomputes: bool = True) -> Iterator[list[float]]:
    """Yield for each part the share of each collective that is beside products, in a loop.

    A turn backward begins with the gradient of the layer's output: gathers of it wait for nothing,
    and take part as the gathers of parameters do.  Sums that the layer waits for are reduced beside
    products that need not wait for them.  Where nothing is computed again, products read their
    parameters from the last to the first.
    """
    each = [move for part in layer for move in part.collectives]
    gathered = {move.weight: move.tensor_bytes for move in each if is_gather(move)}
    reductions = {move.weight: move.times for move in each if is_reduction(move)}
    products, _ = _in_order(layer, gathered)
    early = [name for part in layer for name in _early(part)]
    last = layer[-1].collectives
    begins = [move.why for move in last if move.op == "all_gather" and move.leaves_work]
    forward = exposed_gathers(products, gathered)
    order = products if recomputes else products[::-1]
    again = exposed_gathers(order, gathered, early, begins)
    reduced = set(_reduced_alone(layer, gathered))

    def share(move: Collective) -> float:
        if is_gather(move):
            backward = reductions.get(move.weight, 0.0) / move.times
            return (1 - backward) * (move.weight not in forward) + backward * (
                move.weight not in again
            )
        if move.op == "all_gather":
            return float(move.leaves_work and move.why in begins and move.why not in again)
        return float(move.leaves_work or not (is_awaited(move) or move.weight in reduced))

    for part in layer:
        yield [share(move) for move in part.collectives]


def _early(part: PartCost) -> Iterator[str]:
    """Yield the parameters whose gathers move less than those of values that the part waits for."""
    each = part.collectives
    awaited = (moved.tensor_bytes for moved in each if moved.op == "all_gather" and moved.waits)
    most = max(awaited, default=0.0)
    yield from (moved.weight for moved in each if is_gather(moved) and moved.tensor_bytes < most)


def _reduced_alone(layer: Sequence[PartCost], gathered: Mapping[str, float]) -> Iterator[str]:
    """Yield the parameters whose gradients are reduced beside no product.

    One after the other is reduced, and the one at the end of the longest chain is the last.
    Reductions before sums of a part have none of the products behind these.
    """
    # The chain of a reduction: the bytes of full tensors that it reduces, and of all sums that it
    # waits for.  XLA prices a collective by these, whatever links it has, and links at full rate.
    chains: list[tuple[float, Collective, int]] = []
    waits, ideal = 0.0, efficiency("network")
    for number, part in reversed(list(enumerate(layer))):
        chains += [(waits + c.tensor_bytes, c, number) for c in part.collectives if is_reduction(c)]
        for moved in part.collectives:
            if moved.op == "reduce_scatter" and moved.leaves_work:
                waits += moved.tensor_bytes
                chains.append((waits, moved, number))
    stretches: dict[int, dict[str, float]] = {0: {}}
    first = 0
    for _, moved, number in sorted(chains, key=lambda chain: -chain[0]):
        if moved.weight:
            stretches[first][moved.weight] = moved.seconds * ideal / moved.times
        else:
            first = number
            stretches.setdefault(first, {})
    for first, seconds in stretches.items():
        products, begins = _in_order(layer[first:], gathered)
        yield from exposed_gradients(products, seconds, begins)


def _in_order(
    parts: Sequence[PartCost], gathered: Mapping[str, float]
) -> tuple[list[WeightProduct], int]:
    """Return the products of `parts`, forward, and how many read the input of the first."""
    by_part = [tuple(part.products()) for part in parts]
    first = next(filter(None, by_part), ())
    # Products of the same input can be in any order: the smallest parameter comes first.
    products = sorted((p for p in first if p.is_first), key=lambda p: gathered.get(p.weight, 0.0))
    begins = len(products)
    return [*products, *(p for each in by_part for p in each if p not in products)], begins
