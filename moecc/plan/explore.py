"""Alternatives to the best plan, each with its price or with the reason why it is impossible.

Accumulation, sequences sharded between products, chunked exchanges and replicated experts are
lowered; pipeline stages and context parallelism are priced alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from moecc.errors import InputError
from moecc.ir.mesh import Mesh
from moecc.plan.collectives import BOUND, is_exact, seconds
from moecc.plan.machines import Machine, efficiency, sizes_of_kind
from moecc.plan.networks import Slices, Switch, Torus
from moecc.plan.parts import GlobalShape, Part, StepParts, Weight
from moecc.plan.report import Idea
from moecc.plan.search import Ranking, WorkOn, problems, seconds_text, why_slower
from moecc.plan.step import StepConfig, Strategy, mesh_text
from moecc.plan.time import Estimate, Estimator
from moecc.plan.workload import Batch, Workload
from moecc.sharding.layout import Layout
from moecc.support.text import amount, size_text

# Context parallelism: what a step would take if devices had parts of a sequence, keys gathered.
#
# Each of c devices has an equal part of the queries, cut so that causal masks leave all of them the
# same work, and gathers the keys and values of the whole sequence for each attention; their
# gradients are scattered.  All else is that of c times as many sequences of a c-th of the length.
# moecc prices it and does not lower it: `annotate-sharding` gathers the queries, too.

KEYS = "kv_seq"


@dataclass(frozen=True)
class InContext:
    """A step whose sequences are in parts.

    Attributes:
      parts: of a sequence.
      estimate: of all but the gathers of keys and values.
      gathered_bytes: of keys and values that a device gathers for one attention.
      gather_seconds: of all gathers and scatters of a step, which are waited for.
    """

    parts: int
    estimate: Estimate
    gathered_bytes: float
    gather_seconds: float

    @property
    def seconds(self) -> float:
        """The time of a step."""
        return self.estimate.seconds + self.gather_seconds

    @property
    def total_bytes(self) -> float:
        """The memory of a device: keys and values of a layer, and their gradients, besides."""
        return self.estimate.memory.total + 2 * self.gathered_bytes


def split_batch(batch: Batch, parts: int) -> Batch:
    """Return a batch of as many tokens, in sequences of a part of the length.

    Raises:
      InputError: sequences do not divide, or are of fixed length.
    """
    if not batch.lengths:
        raise InputError("the model has sequences of fixed length alone")
    for name, size in batch.lengths:
        if size % parts:
            raise InputError(f"sequences of {size} tokens ({name}) are not {parts} equal parts")
    lengths = tuple((name, size // parts) for name, size in batch.lengths)
    return Batch(batch.sequences * parts, lengths)


def whole_keys(work: Workload, parts: int) -> Workload:
    """Return work on parts of sequences whose queries meet the keys of all parts.

    Raises:
      InputError: an attention is not one operation.
    """
    if not any(step.attention for part in work.parts for step in part.steps):
        raise InputError("no attention is one operation, and its gathers cannot be told")
    return replace(
        work,
        parts=tuple(
            replace(part, steps=tuple(_step(step, parts) for step in part.steps))
            for part in work.parts
        ),
    )


def _step(step: StepParts, parts: int) -> StepParts:
    if step.attention is None:
        return step
    return replace(
        step,
        axes=_longer(step.axes, parts),
        operands=tuple(_longer(shape, parts) for shape in step.operands),
        attention=replace(step.attention, scores=_longer(step.attention.scores, parts)),
    )


def _longer(shape: GlobalShape, parts: int) -> GlobalShape:
    return GlobalShape(tuple((n, size * parts if n == KEYS else size) for n, size in shape))


def in_context(
    work: Workload, machine: Machine, config: StepConfig, strategy: Strategy, parts: int
) -> InContext:
    """Return the cost of a step whose sequences are in parts along an axis of data.

    Args:
      work: of parts of sequences, see `split_batch` and `whole_keys`.
      machine: where.
      config: the settings of the step.
      strategy: what is chosen; the innermost axis of the batch that `parts` divides is split.
      parts: of a sequence.

    Raises:
      InputError: no axis of the batch can be split.
    """
    mesh, axis = _split_mesh(strategy, parts)
    estimator = Estimator(work, machine, config)
    estimate = estimator.estimate(strategy)
    routes = machine.network.routes(mesh.sizes)
    width, shards = config.compute_type.itemsize_bytes, strategy.layout.shards
    most = total = 0.0
    for part in work.parts:
        for step in (s for s in part.steps if s.attention is not None):
            for shape in step.operands[1:3]:
                heads = shards["kv_head"] if "kv_head" in shape.names else shards["head"]
                size = shape.elements / shards["batch"] / heads * width
                most = max(most, size)
                passes = 2 + step.computed_again(strategy.remat) if config.train else 1
                total += part.count * passes * seconds("all_gather", routes[axis,], size)
    return InContext(
        parts, estimate, 2 * most, config.micro_batches * total / efficiency("network")
    )


def _split_mesh(strategy: Strategy, parts: int) -> tuple[Mesh, str]:
    """Return the mesh with an axis of its own for the parts, and its name."""
    layout = strategy.layout
    for name in reversed(layout.batch_axes):
        size = layout.sizes[name]
        if size % parts == 0 and name not in layout.expert_axes:
            axes: list[tuple[str, int]] = []
            for n, s in layout.mesh.axes:
                axes += [(n, s // parts), ("context", parts)] if n == name else [(n, s)]
            return Mesh(tuple(axes)), "context"
    raise InputError(f"no mesh axis of the batch has {parts} devices for a sequence")


# Pipeline stages: what a step would take if devices had a part of the layers each.
#
# Every stage has the same number of layers and of devices; micro-batches go through the stages one
# after the other, one forward and one backward at a time (PipeDream-flush, Narayanan et al. 2021).
# With p stages and m micro-batches, p − 1 of m + p − 1 turns are idle in each stage, and the first
# stage keeps what the backward pass needs of min(m, p) micro-batches.  moecc prices stages and does
# not lower them.

OPTIMIZER = "optimizer"
"""The part that a stage does once, after all micro-batches."""


@dataclass(frozen=True)
class Staged:
    """A step in stages.

    Attributes:
      stages: how many.
      micro_batches: how many go through them.
      slowest: the stage that takes the longest, on its own devices, for all micro-batches.
      send_seconds: what it takes to send the activations of a micro-batch to the next stage.
      total_bytes: of the device that needs the most.
    """

    stages: int
    micro_batches: int
    slowest: Estimate
    send_seconds: float
    total_bytes: float

    @property
    def turns(self) -> int:
        """The turns of a stage, idle ones included."""
        return self.micro_batches + self.stages - 1

    @property
    def bubble(self) -> float:
        """The share of its turns in which a stage is idle."""
        return (self.stages - 1) / self.turns

    @property
    def seconds(self) -> float:
        """The time of a step: all turns, each with a send forward and one back, and the update."""
        once = sum(p.seconds for p in self.slowest.parts if p.name == OPTIMIZER)
        turn = (self.slowest.seconds - once) / self.micro_batches
        return self.turns * (turn + 2 * self.send_seconds) + once


def part_of_machine(machine: Machine, stages: int) -> Machine:
    """Return the devices of one stage as a machine.

    Raises:
      InputError: there is no machine of that kind with so many devices.
    """
    devices, odd = divmod(machine.devices, stages)
    if not odd and machine.kind == "cpu" and isinstance(machine.network, Switch):
        return replace(machine, devices=devices, network=replace(machine.network, devices=devices))
    smaller = (m for m in sizes_of_kind(machine) if m.devices == devices)
    part = None if odd else next(smaller, None)
    if part is None:
        some = f"{amount(machine.devices, 'device')} {'is' if machine.devices == 1 else 'are'}"
        raise InputError(f"{some} not {stages} machines of that kind")
    return part


def stage_work(work: Workload, stages: int, *, last: bool) -> Workload:
    """Return what the first stage computes, or the last one.

    The first has what is before the layers, the last what is behind them; a parameter of both is in
    both.

    Raises:
      InputError: the layers are in several stacks, or not as many in each stage.
    """
    stacks = {layer.name for layer in work.layers}
    if len(stacks) != 1:
        raise InputError(f"stages are priced for one stack of layers, not {len(stacks)}")
    for layer in work.layers:
        if layer.count % stages:
            raise InputError(
                f"{layer.count} equal layers are not {stages} equal stages", where=layer.name
            )
    first = next(n for n, part in enumerate(work.parts) if part.in_layer)
    parts = tuple(
        replace(part, count=part.count // stages) if part.in_layer else part
        for number, part in enumerate(work.parts)
        if part.in_layer or (number > first) == last
    )
    return replace(
        work,
        parts=parts,
        layers=tuple(replace(layer, count=layer.count // stages) for layer in work.layers),
        weights=tuple(_weights(work, parts, last)),
        head=work.head if last else None,
    )


def _weights(work: Workload, parts: tuple[Part, ...], last: bool) -> Iterator[tuple[Weight, int]]:
    counts: dict[object, tuple[Weight, int]] = {}
    met = [(weight, part.count) for part in parts for weight in part.weights]
    shapes = {weight.shape for weight, _ in met}
    if last and work.head is not None:
        # A head that is tied to the embedding has a copy of it.
        met += [(weight, 1) for weight in work.head.weights if weight.shape not in shapes]
    for weight, count in met:
        key = (weight.shape, weight.of_experts)
        first, before = counts.get(key, (weight, 0))
        counts[key] = first, before + count
    yield from counts.values()


def stage_meshes(mesh: Mesh, stages: int) -> Iterator[Mesh]:
    """Yield meshes of the devices of one stage: one axis is that much smaller."""
    for name, size in mesh.axes:
        if size % stages == 0:
            axes = tuple((n, s // stages if n == name else s) for n, s in mesh.axes)
            yield Mesh(tuple((n, s) for n, s in axes if s > 1) or (("data", 1),))


def staged(
    work: Workload, machine: Machine, config: StepConfig, like: Strategy, stages: int
) -> Staged:
    """Return the fastest step in so many stages, on meshes like that of a plan, that fits.

    Args:
      work: the model and one micro-batch of `config`.
      machine: all devices.
      config: the settings of the step; its micro-batches are those that go through the stages.
      like: the plan whose mesh is divided.
      stages: how many.

    Raises:
      InputError: the layers or devices do not divide, or nothing fits.
    """
    ends = [stage_work(work, stages, last=last) for last in (False, True)]
    legal = [
        step
        for mesh in stage_meshes(like.layout.mesh, stages)
        for remat in work.remats
        if (step := _on(ends, machine, config, _strategy(like, mesh, remat), stages)) is not None
    ]
    fitting = [step for step in legal if step.total_bytes <= machine.usable_bytes]
    if not fitting:
        reason = "no mesh of a stage divides a micro-batch" if not legal else "no stage fits"
        raise InputError(reason, found=f"{config.micro_batches} micro-batches")
    return min(fitting, key=lambda step: step.seconds)


def _strategy(like: Strategy, mesh: Mesh, remat: str) -> Strategy:
    """Return the strategy on a mesh; without devices along model there is no row to slice."""
    layout = replace(like.layout, mesh=mesh)
    return replace(
        like, layout=layout, sliced=like.sliced and bool(layout.tensor_axes), remat=remat
    )


def _on(
    ends: list[Workload], machine: Machine, config: StepConfig, strategy: Strategy, stages: int
) -> Staged | None:
    """Return a step whose stages use a strategy; None where it is not legal."""
    layout, part = strategy.layout, part_of_machine(machine, stages)
    if any(problems(layout, ends[0])) or not _reaches(strategy):
        return None
    estimates = [Estimator(work, part, config).estimate(strategy) for work in ends]
    flying = min(config.micro_batches, stages) - 1
    first, last = (e.memory.total for e in estimates)
    # The first stage is furthest ahead of the backward pass.
    most = max(first + flying * estimates[0].memory.activations, last)
    inputs = next(layer.inputs for layer in ends[0].layers)
    elements = sum(shape.elements for shape in inputs) / layout.shards["batch"]
    sent = elements / layout.shards["seq"] * config.compute_type.itemsize_bytes
    return Staged(
        stages, config.micro_batches, max(estimates, key=lambda e: e.seconds),
        sent / _link(part, machine), most,
    )  # fmt: skip


def _reaches(strategy: Strategy) -> bool:
    """Whether the way to the experts is one for experts that are on several devices, or not."""
    apart = bool(strategy.layout.split(strategy.layout.sharded("expert", of_rows=True)))
    return (strategy.via != "local") == (apart and strategy.layout.experts > 0)


def _link(part: Machine, machine: Machine) -> float:
    """Return the bytes per second that a device sends to the same one of the next stage."""
    network, full = part.network, machine.network
    if isinstance(full, Slices):
        # Stages are cut along the slices first.
        return full.outer_bytes_per_second
    if isinstance(network, Torus):
        return min(dim.link_bytes_per_second for dim in network.dims)
    assert isinstance(network, Switch), "slices are of tori"
    between = network.node_bytes_per_second / network.per_node
    return between if part.devices >= network.per_node else network.link_bytes_per_second


OfBatch = Callable[[Batch], Workload]
"""The work of a batch."""

NOT_LOWERED = {
    "pipeline stages": "not lowered: every device runs all layers",
    "context parallelism": "not lowered: attention gathers the queries, too",
}


@dataclass(frozen=True)
class PlannedStep:
    """A planned step, with the means to plan others.

    Attributes:
      work: the model and its micro-batch.
      machine: where.
      config: the settings of the step.
      ranking: what the search found.
      work_on: the work in other micro-batches.
      of_batch: the work of another batch.
    """

    work: Workload
    machine: Machine
    config: StepConfig
    ranking: Ranking
    work_on: WorkOn
    of_batch: OfBatch

    @property
    def best(self) -> Estimate:
        """The best plan."""
        return self.ranking.best

    def fits(self, total_bytes: float) -> bool:
        """Whether a device has the memory."""
        return total_bytes <= self.machine.usable_bytes


def explore(planned: PlannedStep) -> tuple[Idea, ...]:
    """Return what one would try beside the best plan: the fastest first, the impossible last."""
    kinds = [_sequences, _chunks, _replicas]
    if planned.config.train:
        kinds += [_accumulation, _stages]
    ideas = [idea for kind in [*kinds, _contexts] for idea in kind(planned)]
    return tuple(sorted(ideas, key=lambda idea: (idea.seconds is None, idea.seconds or 0.0)))


def _priced(planned: PlannedStep, idea: Idea) -> Idea:
    """Return an idea, without its price where it does not fit."""
    needed = idea.total_bytes
    if needed is None or planned.fits(needed):
        return idea
    why = f"needs {size_text(needed)} of {size_text(planned.machine.usable_bytes)}"
    return replace(idea, seconds=None, total_bytes=None, why=why)


def _impossible(name: str, how: str, why: str) -> Idea:
    return Idea(name, how, lowered=name not in NOT_LOWERED, why=why)


def _accumulation(planned: PlannedStep) -> Iterator[Idea]:
    """Yield the same mesh with more micro-batches: less is kept, so less may be computed again."""
    for times in (2, 4):
        count = planned.config.micro_batches * times
        name, how = "accumulation", f"{count} micro-batches"
        try:
            work = planned.work_on(planned.machine, count)
        except InputError as error:
            yield _impossible(name, how, f"{error.problems[0].message}: {error.problems[0].found}")
            continue
        layout = planned.best.strategy.layout
        if wrong := list(problems(layout, work)):
            yield _impossible(name, how, wrong[0].message)
            continue
        config = replace(planned.config, micro_batches=count)
        estimator = Estimator(work, planned.machine, config)
        tried = [estimator.estimate(replace(planned.best.strategy, remat=r)) for r in work.remats]
        estimate = min((e for e in tried if e.fits), key=lambda e: e.seconds, default=tried[-1])
        options = f"--micro-batches {count} --remat {estimate.strategy.remat}"
        yield _priced(planned, _idea(name, how, options, estimate, planned))


def _idea(name: str, how: str, options: str, estimate: Estimate, planned: PlannedStep) -> Idea:
    why = _memory(estimate, planned.best)
    if estimate is planned.best:
        return Idea(
            name, how, "", True, estimate.seconds, estimate.memory.total, "the best plan itself"
        )
    if estimate.seconds > planned.best.seconds:
        why = f"{why}; {why_slower(estimate, planned.best)}"
    if not is_exact(estimate.strategy.via, planned.work.dropless):
        why = f"{why}; rows beyond {BOUND} times the mean may be lost"
    return Idea(name, how, options, True, estimate.seconds, estimate.memory.total, why)


def _asking(strategy: Strategy) -> str:
    """Return the options that ask for a strategy; some only ``moecc compile`` has."""
    is_compiled = strategy.sliced or strategy.chunks > 1
    return f"{'moecc compile ' if is_compiled else ''}{strategy.options}"


def _sequences(planned: PlannedStep) -> Iterator[Idea]:
    """Yield the fastest plan that splits neurons, with sequences sharded between products."""
    name = "sequence parallelism"
    split = [e for e in planned.ranking.searched if "model" in e.strategy.layout.sizes
             and not e.strategy.layout.stated and not e.strategy.sliced]  # fmt: skip
    if not split:
        yield _impossible(name, "along model", "no plan that splits heads and neurons fits")
        return
    like = split[0].strategy
    rules = (*like.layout.names, "sequence-parallel")
    layout = Layout.ruled(like.layout.mesh, planned.work.experts, rules)
    how = f"mesh {mesh_text(layout.sizes)}"
    if wrong := list(problems(layout, planned.work)):
        yield _impossible(name, how, wrong[0].message)
        return
    estimator = Estimator(planned.work, planned.machine, planned.config)
    estimate = estimator.estimate(replace(like, layout=layout))
    idea = _idea(name, how, _asking(estimate.strategy), estimate, planned)
    gain = 1 - estimate.seconds / split[0].seconds
    time = f"{abs(gain):.1%} {'less' if gain >= 0 else 'more'} time"
    same = f"{time} and {_memory(estimate, split[0])} than the same mesh without"
    yield _priced(planned, replace(idea, why=f"{same}; {idea.why}"))


def _memory(estimate: Estimate, reference: Estimate) -> str:
    """Return what one needs beside another."""
    saved = reference.memory.total - estimate.memory.total
    return f"{size_text(abs(saved))} {'less' if saved >= 0 else 'more'}"


def _chunks(planned: PlannedStep) -> Iterator[Idea]:
    """Yield the fastest plan that exchanges slots, with exchanges beside products of experts."""
    name = "chunked exchanges"
    some = [e for e in planned.ranking.searched if e.strategy.via == "capacity"]
    if not some:
        yield _impossible(name, "2 chunks", "no plan that fits exchanges slots of a capacity")
        return
    unchunked = some[0]
    estimator = Estimator(planned.work, planned.machine, planned.config)
    groups = planned.work.batch.sequences // unchunked.strategy.layout.shards["batch"]
    for count in (2, 4):
        how = f"{count} chunks, {unchunked.strategy}"
        if groups % count:
            needs = f"each chunk needs token groups of its own; sequences of a device: {groups}"
            yield _impossible(name, how, needs)
            continue
        cut = estimator.estimate(replace(unchunked.strategy, chunks=count))
        spared = f"{seconds_text(unchunked.seconds - cut.seconds)} of exchanges beside experts"
        idea = _idea(name, how, _asking(cut.strategy), cut, planned)
        yield replace(idea, why=f"{spared}; {idea.why}")


def _replicas(planned: PlannedStep) -> Iterator[Idea]:
    """Yield the fastest plan whose experts are on fewer devices than there are, several times."""
    name = "expert replication"
    if not planned.work.experts:
        return
    for estimate in planned.ranking.searched:
        layout = estimate.strategy.layout
        copies = (
            planned.machine.devices // layout.shards["expert"] // layout.size(layout.tensor_axes)
        )
        stored = layout.sizes.get("fsdp", 1)
        if layout.shards["expert"] > 1 and copies > 1 and stored == 1:
            how = f"{copies} devices have each expert, {estimate.strategy}"
            yield _idea(name, how, _asking(estimate.strategy), estimate, planned)
            return
    yield _impossible(name, "", "no plan fits in which several devices have the same experts")


def _stages(planned: PlannedStep) -> Iterator[Idea]:
    """Yield the fastest division in two and in four stages."""
    name = "pipeline stages"
    for stages in (2, 4):
        how, best = f"{stages} stages", None
        try:
            part_of_machine(planned.machine, stages)
            stage_work(planned.work, stages, last=False)
        except InputError as error:
            yield _impossible(name, how, error.problems[0].message)
            continue
        why = ""
        for count in (stages, 2 * stages, 4 * stages):
            try:
                work = planned.work_on(planned.machine, count)
                config = replace(planned.config, micro_batches=count)
                candidate = staged(work, planned.machine, config, planned.best.strategy, stages)
            except InputError as error:
                why = error.problems[0].message
                continue
            best = candidate if best is None or candidate.seconds < best.seconds else best
        if best is None:
            yield _impossible(name, how, why)
            continue
        how = f"{stages} stages, {best.micro_batches} micro-batches, {best.slowest.strategy}"
        idle = best.bubble * best.seconds
        sends = f"{seconds_text(best.send_seconds)} a send"
        why = f"{NOT_LOWERED[name]}; {seconds_text(idle)} idle ({best.bubble:.0%}), {sends}"
        yield Idea(name, how, seconds=best.seconds, total_bytes=best.total_bytes, why=why)


def _contexts(planned: PlannedStep) -> Iterator[Idea]:
    """Yield parts of sequences on two and on four devices."""
    name = "context parallelism"
    for parts in (2, 4):
        how = f"sequences on {parts} devices"
        try:
            work = whole_keys(planned.of_batch(split_batch(planned.work.batch, parts)), parts)
            step = in_context(work, planned.machine, planned.config, planned.best.strategy, parts)
        except InputError as error:
            yield _impossible(name, how, error.problems[0].message)
            continue
        gathers = f"{seconds_text(step.gather_seconds)} of gathers of keys and values"
        how, why = f"{how}, {step.estimate.strategy}", f"{NOT_LOWERED[name]}; {gathers}"
        idea = Idea(name, how, seconds=step.seconds, total_bytes=step.total_bytes, why=why)
        yield _priced(planned, idea)
