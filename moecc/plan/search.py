"""The search: every mesh, exchange and rematerialisation that fits, the fastest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations

from moecc.errors import InputError
from moecc.plan.candidates import check_constraints, strategies
from moecc.plan.collectives import is_exact
from moecc.plan.machines import Machine, sizes_of_kind
from moecc.plan.step import StepConfig, Strategy
from moecc.plan.time import Estimate, Estimator
from moecc.plan.workload import Workload
from moecc.support.text import amount, size_text
from moecc.support.untyped import JsonDict

# What would fit where a plan does not: other options first, then a larger machine.
#
# Each is planned anew before it is named.

WorkOn = Callable[[Machine, int], Workload]
"""The work on a machine in so many micro-batches: a batch may grow with the devices."""

Change = JsonDict
"""New values of fields of `StepConfig`."""

Spelling = Callable[[str, str], str]
"""How a field and its new value are asked for."""

MOST_PARTS = 256


def as_option(name: str, value: str) -> str:
    """Return a field and its value as ``moecc plan`` and ``moecc compile`` take them."""
    return f"--{name.replace('_', '-')} {value}"


@dataclass(frozen=True)
class Asked:
    """What was asked of a plan.

    Attributes:
      machine: where.
      config: the settings of the step.
      work: the model and its micro-batch.
      work_on: the work elsewhere, or in other parts; None where it is known here alone.
      spelling: how other options are named.
      share: of a device's memory, what a plan may need.
    """

    machine: Machine
    config: StepConfig
    work: Workload
    work_on: WorkOn | None = None
    spelling: Spelling = as_option
    share: float = 1.0

    def changed(self, change: Change) -> Asked:
        """Return what is asked after a change."""
        work = self.work
        if self.work_on is not None and "micro_batches" in change:
            work = self.work_on(self.machine, change["micro_batches"])
        return replace(self, config=replace(self.config, **change), work=work)

    def on(self, machine: Machine) -> Asked:
        """Return what is asked of another machine, on any mesh."""
        work = self.work
        if self.work_on is not None:
            work = self.work_on(machine, self.config.micro_batches)
        free = replace(self.config, mesh=None)
        return replace(self, machine=machine, config=free, work=work)

    def fitting(self) -> Strategy | None:
        """Return a strategy that fits, the first that is met."""
        work, estimator = self.work, Estimator(self.work, self.machine, self.config)
        limit = self.machine.usable_bytes * self.share
        return next(
            (
                s
                for s in strategies(work, self.machine, self.config)
                if estimator.memory(s).total <= limit
            ),
            None,
        )


def nothing_fits(asked: Asked, least: tuple[float, Strategy] | None) -> InputError:
    """Return the error of a plan without a strategy that fits.

    Args:
      asked: what was asked.
      least: the strategy that needs the least, and its bytes; None where none is legal.
    """
    if least is None:
        return _nothing_legal(asked)
    size, strategy = least
    machine = asked.machine
    return InputError(
        "does not fit",
        where=machine.name,
        expected=f"at most {size_text(machine.usable_bytes)} a device",
        found=f"{size_text(size)} with {strategy}, the least",
        hint=way_out(asked),
    )


def _nothing_legal(asked: Asked) -> InputError:
    machine, config, work = asked.machine, asked.config, asked.work
    free = strategies(work, machine, replace(config, via=None))
    if config.via is not None and next(free, None) is not None:
        return InputError(
            f"nothing goes via {config.via}",
            where=machine.name,
            expected="experts on several devices"
            + (", and keep every row" if config.via == "ragged" else ""),
            found=f"{amount(work.experts, 'expert')}, {amount(machine.devices, 'device')}",
        )
    return InputError(
        "no mesh of this machine divides model and batch",
        where=machine.name,
        found=f"{amount(machine.devices, 'device')}, {amount(work.batch.sequences, 'sequence')}"
        + (f", {amount(work.experts, 'expert')}" if work.experts else ""),
        hint=_undivided(asked),
    )


def _undivided(asked: Asked) -> str:
    """Return what to change where no mesh is legal: the batch, if it is that, or the devices."""
    batch, devices = asked.work.batch, asked.machine.devices * asked.config.micro_batches
    if batch.sequences % devices:
        return f"--batch-tokens {devices * batch.sequence_tokens} is a sequence a device"
    return "fewer devices" if asked.config.rules is None else "fewer devices, or other --rules"


def way_out(asked: Asked) -> str:
    """Return what would fit, as options of the command line, then the smallest machine."""
    found = remedies(asked)
    larger = smallest_that_fits(asked)
    text = f"{' or '.join(found)} would" if found else ""
    if larger is None:
        return text or "no machine of the kind would"
    named = f"{larger.name} is the smallest that would"
    return f"{text}; {named}" if text else named


def remedies(asked: Asked) -> list[str]:
    """Return the options under which something fits on the same machine.

    Those that do it alone; where none does, the first that do it together.
    """
    changes = list(_changes(asked))
    alone = [text for change in changes if (text := _tried(asked, change))]
    kinds = [change for change in changes if "micro_batches" not in change]
    if alone:
        return alone
    for number in (2, 3):
        for several in combinations(kinds, number):
            together = {n: v for change in several for n, v in change.items()}
            if text := _tried(asked, together):
                return [text]
    together = {n: v for change in kinds for n, v in change.items()}
    text = _in_parts(asked, together) if asked.config.train else None
    return [text] if text else []


def _changes(asked: Asked) -> Iterator[Change]:
    """Yield what may be changed of what is asked, that which costs the least first."""
    config = asked.config
    if config.dense_weights is not None:
        yield {"dense_weights": None}
    if config.mesh is not None:
        yield {"mesh": None}
    if config.train:
        if config.remat not in (None, "full"):
            yield {"remat": "full"}
        yield {"micro_batches": 0}
        if config.optimizer == "adamw":
            yield {"optimizer": "adafactor"}
    if config.weight_type.itemsize_bytes > config.compute_type.itemsize_bytes:
        yield {"weight_dtype": config.compute_type.name}


def _tried(asked: Asked, change: Change) -> str | None:
    """Return the options of a change under which something fits, or None."""
    if "micro_batches" in change:
        return _in_parts(asked, {})
    found = asked.changed(change).fitting()
    return None if found is None else _options(asked, change, found)


def _in_parts(asked: Asked, change: Change) -> str | None:
    """Return the fewest micro-batches with which something fits after a change, or None."""
    if asked.work_on is None:
        return None
    parts = asked.config.micro_batches * 2
    sequences = asked.work.batch.sequences * asked.config.micro_batches
    while parts <= MOST_PARTS and sequences % parts == 0:
        tried = {**change, "micro_batches": parts}
        found = asked.changed(tried).fitting()
        if found is not None:
            return _options(asked, tried, found)
        parts *= 2
    return None


def _options(asked: Asked, change: Change, found: Strategy) -> str:
    """Return the options that stand for a change, and for what was found."""
    layout = found.layout
    mesh = ",".join(f"{name}={size}" for name, size in layout.mesh.axes)
    said = {n: str(v) for n, v in change.items()}
    if "mesh" in change:
        said["mesh"] = mesh
    if "dense_weights" in change or ("mesh" in change and layout.dense_weights == "split"):
        said["dense_weights"] = layout.dense_weights
    return " ".join(asked.spelling(name, text) for name, text in said.items())


def smallest_that_fits(asked: Asked) -> Machine | None:
    """Return the smallest machine of the same chip on which something fits, or None.

    A mesh that was wished for is no longer one.
    """
    larger = (m for m in sizes_of_kind(asked.machine) if m.devices > asked.machine.devices)
    return next((m for m in larger if asked.on(m).fitting()), None)


@dataclass(frozen=True)
class Ranking:
    """What the search found.

    Attributes:
      best: the fastest that fits and keeps the function.
      others: the next ones, of other kinds first: other axes, another way or rematerialisation.
      tried: how many strategies were estimated.
      fitting: how many of them fit.
      lossy: the fastest that may lose rows, where it is faster than `best`.
      searched: all that fit, fastest first.
    """

    best: Estimate
    others: tuple[Estimate, ...]
    tried: int
    fitting: int
    lossy: Estimate | None = None
    searched: tuple[Estimate, ...] = ()


def search(
    work: Workload,
    machine: Machine,
    config: StepConfig,
    keep: int = 5,
    work_on: WorkOn | None = None,
    spelling: Spelling = as_option,
) -> Ranking:
    """Rank the strategies for `work` on `machine`.

    Args:
      work: the model and its batch.
      machine: where.
      config: the settings of the step; the search decides those that are None.
      keep: how many beside the best.
      work_on: the work on another machine, or in other micro-batches; None where it is the same.
      spelling: how options that would fit are named.

    Raises:
      InputError: nothing is legal, or nothing fits; options that would, and the smallest machine
        that would, are named.
    """
    check_constraints(work, machine, config)
    estimator = Estimator(work, machine, config)
    tried, found, least = 0, [], None
    for strategy in strategies(work, machine, config):
        tried += 1
        needed = estimator.memory(strategy)
        total = needed.total
        if total <= machine.usable_bytes:
            found.append(estimator.estimate(strategy, needed))
        elif least is None or total < least[0]:
            least = (total, strategy)
    if not found:
        raise nothing_fits(Asked(machine, config, work, work_on, spelling), least)
    found.sort(key=lambda e: e.seconds)
    keeping = found
    if config.via is None:
        keeping = [e for e in found if is_exact(e.strategy.via, work.dropless)] or found
    best, *others = _distinct(keeping)
    others = _of_other_kinds(best, others, keep)
    lossy = found[0] if found[0] is not best else None
    return Ranking(best, tuple(others), tried, len(found), lossy, tuple(found))


def _distinct(found: list[Estimate]) -> Iterator[Estimate]:
    """Yield those that are not an earlier one with other names for its axes."""
    seen: set[tuple[float, float]] = set()
    for estimate in found:
        figures = (estimate.seconds, estimate.memory.total)
        if figures not in seen:
            seen.add(figures)
            yield estimate


def _of_other_kinds(best: Estimate, others: list[Estimate], keep: int) -> list[Estimate]:
    """Return the fastest of each kind but that of the best; where they are few, more of the same.

    Meshes that differ in their sizes alone would fill the list with one idea.
    """
    first = {_kind(best): best}
    for estimate in others:
        first.setdefault(_kind(estimate), estimate)
    kinds = [e for e in first.values() if e is not best]
    chosen = set(map(id, kinds))
    more = [e for e in others if id(e) not in chosen]
    return sorted([*kinds, *more][:keep], key=lambda e: e.seconds)


def _kind(estimate: Estimate) -> tuple[frozenset[str], str, str]:
    strategy = estimate.strategy
    axes = frozenset(name for name, size in strategy.layout.mesh.sizes.items() if size > 1)
    return axes, strategy.via, strategy.remat


def why_slower(other: Estimate, best: Estimate) -> str:
    """Return why `other` loses to `best`: what it takes longer for."""
    more = {k: s - best.by_kind[k] for k, s in other.by_kind.items()}
    kind = max(more, key=lambda k: more[k])
    words = {"local": "computation", "exchange": "waiting for data", "parameters": "parameters"}
    text = f"{words[kind]} takes {seconds_text(max(more[kind], 0.0))} more"
    if kind != "local":
        return f"{text}: {_heaviest(other, waits=kind == 'exchange')}"
    if other.flops > best.flops * 1.01:
        return f"{text}: {other.flops / best.flops:.2f} times the FLOPs"
    return f"{text}: {_slowest(other, best)}"


def _slowest(other: Estimate, best: Estimate) -> str:
    """Return the part whose computation and memory take the most longer than in `best`."""
    before = {p.name: p.local_seconds for p in best.parts}
    return max(other.parts, key=lambda p: p.local_seconds - before.get(p.name, 0.0)).name


def _heaviest(estimate: Estimate, *, waits: bool) -> str:
    """Return the collective that takes the longest, with its mesh axes and purpose."""
    each = ((p, c) for p in estimate.parts for c in p.collectives if c.waits is waits)
    longest = max(each, key=lambda pair: pair[0].count * pair[1].seconds, default=None)
    if longest is None:
        return "no collective"
    return f"{longest[1].op} over {' x '.join(longest[1].axes)} ({longest[1].why})"


def seconds_text(seconds: float) -> str:
    """Return a time for people."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"
