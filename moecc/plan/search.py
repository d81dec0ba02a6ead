"""The search: every mesh, exchange and rematerialisation that fits, the fastest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moecc.plan.candidates import Constraints, check_constraints, strategies
from moecc.plan.estimate import Estimate, Estimator
from moecc.plan.exchanges import exact
from moecc.plan.machines import Machine
from moecc.plan.remedies import Asked, Spelling, WorkOn, as_option, nothing_fits
from moecc.plan.strategy import StepConfig
from moecc.plan.workload import Workload


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
    constraints: Constraints | None = None,
    keep: int = 5,
    work_on: WorkOn | None = None,
    spelling: Spelling = as_option,
) -> Ranking:
    """Rank the strategies for `work` on `machine`.

    Args:
      work: the model and its batch.
      machine: where.
      config: what is given.
      constraints: what the user fixed.
      keep: how many beside the best.
      work_on: the work on another machine, or in other micro-batches; None where it is the same.
      spelling: how options that would fit are named.

    Raises:
      InputError: nothing is legal, or nothing fits; options that would, and the smallest machine
        that would, are named.
    """
    constraints = constraints or Constraints()
    check_constraints(work, machine, constraints)
    estimator = Estimator(work, machine, config)
    tried, found, least = 0, [], None
    for strategy in strategies(work, machine, constraints, config.train):
        tried += 1
        needed = estimator.memory(strategy)
        total = needed.total
        if total <= machine.usable_bytes:
            found.append(estimator.estimate(strategy, needed))
        elif least is None or total < least[0]:
            least = (total, strategy)
    if not found:
        raise nothing_fits(Asked(machine, config, constraints, work, work_on, spelling), least)
    found.sort(key=lambda e: e.seconds)
    keeping = found
    if constraints.via is None:
        keeping = [e for e in found if exact(e.strategy.via, work.dropless)] or found
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
    found = ((p.count * s, t) for p in estimate.parts for t, s in p.transfers if t.waits is waits)
    best = max(found, key=lambda pair: pair[0], default=None)
    if best is None:
        return "no collective"
    return f"{best[1].op} over {' x '.join(best[1].axes)} ({best[1].why})"


def seconds_text(seconds: float) -> str:
    """Return a time for people."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"
