"""What one would try beside the best plan: each priced, or with the reason why it is none.

Accumulation, sequences sharded between products, chunked exchanges and replicated experts are
lowered; pipeline stages and context parallelism are priced alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from moecc.errors import InputError
from moecc.plan.batches import Batch
from moecc.plan.context import in_context, split_batch, whole_keys
from moecc.plan.estimate import Estimate, Estimator
from moecc.plan.layouts import problems
from moecc.plan.machines import Machine
from moecc.plan.remedies import WorkOn
from moecc.plan.report_types import Idea
from moecc.plan.search import Ranking, seconds_text, why_slower
from moecc.plan.stages import part_of_machine, stage_work, staged
from moecc.plan.strategy import StepConfig, Strategy
from moecc.plan.workload import Workload
from moecc.sharding.layout import Layout
from moecc.sharding.vias import LOCAL
from moecc.support.text import size_text

OfBatch = Callable[[Batch], Workload]
"""The work of a batch."""

NOT_LOWERED = {
    "pipeline stages": "not lowered: every device runs all layers",
    "context parallelism": "not lowered: attention gathers the queries, too",
}


@dataclass(frozen=True)
class Known:
    """What was planned.

    Attributes:
      work: the model and its micro-batch.
      machine: where.
      config: what is given.
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


def explore(known: Known) -> tuple[Idea, ...]:
    """Return what one would try beside the best plan: the fastest first, the impossible last."""
    kinds = [_sequences, _chunks, _replicas]
    if known.config.train:
        kinds += [_accumulation, _stages]
    found = [idea for kind in [*kinds, _contexts] for idea in kind(known)]
    return tuple(sorted(found, key=lambda idea: (idea["seconds"] is None, idea["seconds"] or 0.0)))


def _priced(known: Known, idea: Idea) -> Idea:
    """Return an idea, without its price where it does not fit."""
    needed = idea["total_bytes"]
    if needed is None or known.fits(needed):
        return idea
    why = f"needs {size_text(needed)} of {size_text(known.machine.usable_bytes)}"
    return {**idea, "seconds": None, "total_bytes": None, "why": why}


def _made(
    name: str, how: str, why: str, seconds: float | None = None, total_bytes: float | None = None,
    *, options: str = "", lowered: bool = False,
) -> Idea:  # fmt: skip
    return {
        "name": name, "how": how, "options": options, "lowered": lowered,
        "seconds": seconds, "total_bytes": total_bytes, "why": why,
    }  # fmt: skip


def _impossible(name: str, how: str, why: str) -> Idea:
    return _made(name, how, why, lowered=name not in NOT_LOWERED)


def _accumulation(known: Known) -> Iterator[Idea]:
    """Yield the same mesh with more micro-batches: less is kept, so less may be computed again."""
    for times in (2, 4):
        count = known.config.micro_batches * times
        name, how = "accumulation", f"{count} micro-batches"
        try:
            work = known.work_on(known.machine, count)
        except InputError as error:
            yield _impossible(name, how, f"{error.problems[0].what}: {error.problems[0].found}")
            continue
        layout = known.best.strategy.layout
        if wrong := list(problems(layout, work)):
            yield _impossible(name, how, wrong[0].what)
            continue
        config = replace(known.config, micro_batches=count)
        estimator = Estimator(work, known.machine, config)
        tried = [estimator.estimate(replace(known.best.strategy, remat=r)) for r in work.remats]
        one = min((e for e in tried if e.fits), key=lambda e: e.seconds, default=tried[-1])
        options = f"--micro-batches {count} --remat {one.strategy.remat}"
        yield _priced(known, _idea(name, how, options, one, known))


def _idea(name: str, how: str, options: str, one: Estimate, known: Known) -> Idea:
    why = _why(one, known)
    return _made(name, how, why, one.seconds, one.memory.total, options=options, lowered=True)


def _asking(strategy: Strategy) -> str:
    """Return the options that ask for a strategy; some only ``moecc compile`` has."""
    layout = strategy.layout
    found = [f"--mesh {','.join(f'{n}={s}' for n, s in layout.mesh.axes)}"]
    if layout.own:
        found.insert(0, f"--rules {','.join(layout.own)}")
    elif layout.dense_weights != "whole":
        found.append(f"--dense-weights {layout.dense_weights}")
    if strategy.via != LOCAL:
        found.append(f"--via {strategy.via}")
    found.append(f"--remat {strategy.remat}")
    compiled = ["--slice"] if strategy.sliced else []
    compiled += [f"--chunks {strategy.chunks}"] if strategy.chunks > 1 else []
    return " ".join([*(["moecc compile"] if compiled else []), *found, *compiled])


def _why(one: Estimate, known: Known) -> str:
    """Return what one gains or loses against the best plan."""
    memory = _memory(one, known.best)
    if one.seconds <= known.best.seconds:
        return memory
    return f"{memory}; {why_slower(one, known.best)}"


def _sequences(known: Known) -> Iterator[Idea]:
    """Yield the fastest plan that splits neurons, with sequences sharded between products."""
    name = "sequence parallelism"
    split = [e for e in known.ranking.searched if "model" in e.strategy.layout.sizes
             and not e.strategy.layout.own and not e.strategy.sliced]  # fmt: skip
    if not split:
        yield _impossible(name, "along model", "no plan that splits heads and neurons fits")
        return
    like = split[0].strategy
    rules = (*like.layout.names, "sequence-parallel")
    layout = Layout.ruled(like.layout.mesh, known.work.experts, rules)
    how = f"mesh {','.join(f'{n}={s}' for n, s in layout.mesh.axes)}"
    if wrong := list(problems(layout, known.work)):
        yield _impossible(name, how, wrong[0].what)
        return
    estimator = Estimator(known.work, known.machine, known.config)
    one = estimator.estimate(replace(like, layout=layout))
    idea = _idea(name, how, _asking(one.strategy), one, known)
    gain = 1 - one.seconds / split[0].seconds
    time = f"{abs(gain):.1%} {'less' if gain >= 0 else 'more'} time"
    same = f"{time} and {_memory(one, split[0])} than the same mesh without"
    yield _priced(known, {**idea, "why": f"{same}; {idea['why']}"})


def _memory(one: Estimate, other: Estimate) -> str:
    """Return what one needs beside another."""
    saved = (other.memory.total - one.memory.total) / 1e9
    return f"{abs(saved):.2f} GB {'less' if saved >= 0 else 'more'}"


def _chunks(known: Known) -> Iterator[Idea]:
    """Yield the fastest plan that exchanges slots, with exchanges beside products of experts."""
    name = "chunked exchanges"
    some = [e for e in known.ranking.searched if e.strategy.via == "capacity"]
    if not some:
        yield _impossible(name, "2 chunks", "no plan that fits exchanges slots of a capacity")
        return
    one = some[0]
    estimator = Estimator(known.work, known.machine, known.config)
    groups = known.work.batch.sequences // one.strategy.layout.shards["batch"]
    for count in (2, 4):
        how = f"{count} chunks, {one.strategy}"
        if groups % count:
            needs = f"each chunk needs token groups of its own; sequences of a device: {groups}"
            yield _impossible(name, how, needs)
            continue
        cut = estimator.estimate(replace(one.strategy, chunks=count))
        spared = f"{seconds_text(one.seconds - cut.seconds)} of exchanges beside experts"
        idea = _idea(name, how, _asking(cut.strategy), cut, known)
        yield {**idea, "why": f"{spared}; {idea['why']}"}


def _replicas(known: Known) -> Iterator[Idea]:
    """Yield the fastest plan whose experts are on fewer devices than there are, several times."""
    name = "expert replication"
    if not known.work.experts:
        return
    for one in known.ranking.searched:
        layout = one.strategy.layout
        copies = known.machine.devices // layout.shards["expert"] // layout.size(layout.tensor_axes)
        stored = layout.sizes.get("fsdp", 1)
        if layout.shards["expert"] > 1 and copies > 1 and stored == 1:
            how = f"{copies} devices have each expert, {one.strategy}"
            yield _idea(name, how, _asking(one.strategy), one, known)
            return
    yield _impossible(name, "", "no plan fits in which several devices have the same experts")


def _stages(known: Known) -> Iterator[Idea]:
    """Yield the fastest division in two and in four stages."""
    name = "pipeline stages"
    for stages in (2, 4):
        how, best = f"{stages} stages", None
        try:
            part_of_machine(known.machine, stages)
            stage_work(known.work, stages, last=False)
        except InputError as error:
            yield _impossible(name, how, error.problems[0].what)
            continue
        why = ""
        for count in (stages, 2 * stages, 4 * stages):
            try:
                work = known.work_on(known.machine, count)
                config = replace(known.config, micro_batches=count)
                one = staged(work, known.machine, config, known.best.strategy, stages)
            except InputError as error:
                why = error.problems[0].what
                continue
            best = one if best is None or one.seconds < best.seconds else best
        if best is None:
            yield _impossible(name, how, why)
            continue
        how = f"{stages} stages, {best.micro_batches} micro-batches, {best.slowest.strategy}"
        idle = best.bubble * best.seconds
        sends = f"{seconds_text(best.send_seconds)} a send"
        why = f"{NOT_LOWERED[name]}; {seconds_text(idle)} idle ({best.bubble:.0%}), {sends}"
        yield _made(name, how, why, best.seconds, best.total_bytes)


def _contexts(known: Known) -> Iterator[Idea]:
    """Yield parts of sequences on two and on four devices."""
    name = "context parallelism"
    for parts in (2, 4):
        how = f"sequences on {parts} devices"
        try:
            work = whole_keys(known.of_batch(split_batch(known.work.batch, parts)), parts)
            one = in_context(work, known.machine, known.config, known.best.strategy, parts)
        except InputError as error:
            yield _impossible(name, how, error.problems[0].what)
            continue
        gathers = f"{seconds_text(one.gather_seconds)} of gathers of keys and values"
        how, why = f"{how}, {one.estimate.strategy}", f"{NOT_LOWERED[name]}; {gathers}"
        idea = _made(name, how, why, one.seconds, one.total_bytes)
        yield _priced(known, idea)
