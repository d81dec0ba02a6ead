"""The search: every mesh, exchange and rematerialisation that fits, the fastest first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from moecc.errors import InputError
from moecc.ir.mesh import Mesh
from moecc.plan.estimate import Estimate, Estimator
from moecc.plan.exchanges import SLICED, exact
from moecc.plan.layouts import check_layout, layouts, problems
from moecc.plan.machines import Machine, sizes_of_kind
from moecc.plan.meshes import check_devices, searched_meshes
from moecc.plan.strategy import REMATS, StepConfig, Strategy
from moecc.plan.workload import Workload
from moecc.sharding.layout import Layout
from moecc.sharding.legal import refusals
from moecc.sharding.vias import LOCAL, WAYS, Slots, Via

_NEEDS = {
    "ragged": "ragged is for models without a capacity",
    "hierarchical": "hierarchical is for experts on two mesh axes: --rules expert-hierarchical",
}


@dataclass(frozen=True)
class Constraints:
    """What the user fixed; None leaves it to the search."""

    mesh: Mesh | None = None
    via: str | None = None
    remat: str | None = None
    dense_weights: str | None = None
    rules: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Ranking:
    """What the search found.

    Attributes:
      best: the fastest that fits and keeps the function.
      others: the next ones.
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


def strategies(
    work: Workload, machine: Machine, constraints: Constraints, train: bool
) -> Iterator[Strategy]:
    """Yield every strategy that is legal and agrees with `constraints`."""
    remats = REMATS if constraints.remat is None else (constraints.remat,)
    for layout in _layouts(work, machine, constraints):
        for via in _vias(layout, work, constraints):
            dispatch = "grouped" if work.dropless and via != "capacity" else "index"
            for remat in remats if train else ("none",):
                yield Strategy(layout, via, dispatch, remat)
                if via in SLICED and layout.tensor_axes:
                    yield Strategy(layout, via, dispatch, remat, sliced=True)


def _vias(layout: Layout, work: Workload, constraints: Constraints) -> Iterator[str]:
    """Yield the ways to the experts that a layout has and that agree with `constraints`."""
    for name in legal_vias(layout, work):
        if constraints.via in (None, name) and (name == "replicated") == layout.replicated:
            yield name


def legal_vias(layout: Layout, work: Workload) -> list[str]:
    """Return the ways to the experts that a layout has."""
    tokens, experts = (
        layout.split(axes)
        for axes in (layout.sharded("batch"), layout.sharded("expert", of_rows=True))
    )
    if not work.experts or not experts:
        return [LOCAL]
    return [way.name for way in WAYS if _suits(way, tokens, experts, work)]


def _suits(way: Via, tokens: tuple[str, ...], experts: tuple[str, ...], work: Workload) -> bool:
    """Whether a way suits a layout; a capacity makes slots of fixed number of any model's."""
    slots: Slots = "ragged" if work.dropless and not way.is_bounded else "fixed"
    return not any(refusals(way, tokens, experts, slots))


def _layouts(work: Workload, machine: Machine, constraints: Constraints) -> Iterator[Layout]:
    tried: Iterable[Mesh] = searched_meshes(machine.devices, work.experts, constraints.rules)
    for mesh in tried if constraints.mesh is None else (constraints.mesh,):
        if constraints.rules is None:
            found = layouts(mesh, work)
            yield from (x for x in found if constraints.dense_weights in (None, x.dense_weights))
            continue
        layout = Layout.ruled(mesh, work.experts, constraints.rules)
        if not any(problems(layout, work)):
            yield layout


def check_constraints(work: Workload, machine: Machine, constraints: Constraints) -> None:
    """Check what the user fixed.

    Raises:
      InputError: the mesh has another number of devices, or does not divide what it splits; the
        exchange does not suit model or mesh.
    """
    if constraints.via == "hierarchical" and constraints.rules is None:
        raise InputError(
            "by its names, a mesh shards experts over one axis", hint=_NEEDS["hierarchical"]
        )
    if constraints.mesh is None:
        return
    check_devices(constraints.mesh, machine.devices, machine.name)
    if constraints.rules is None:
        layout = Layout(constraints.mesh, work.experts, "whole", constraints.via == "replicated")
    else:
        layout = Layout.ruled(constraints.mesh, work.experts, constraints.rules)
    check_layout(layout, work)
    devices, fitting = layout.shards["expert"], legal_vias(layout, work)
    if constraints.via is not None and constraints.via not in fitting:
        raise InputError(
            f"experts on {devices} devices cannot be reached via {constraints.via}",
            where=f"mesh {constraints.mesh}",
            expected=", ".join(fitting),
            hint=_NEEDS.get(constraints.via),
        )


WorkOn = Callable[[Machine], Workload]
"""What a machine would be given: a batch may grow with its devices."""


def search(
    work: Workload,
    machine: Machine,
    config: StepConfig,
    constraints: Constraints | None = None,
    keep: int = 5,
    work_on: WorkOn | None = None,
) -> Ranking:
    """Rank the strategies for `work` on `machine`.

    Args:
      work: the model and its batch.
      machine: where.
      config: what is given.
      constraints: what the user fixed.
      keep: how many beside the best.
      work_on: the work on another machine; None where it is the same.

    Raises:
      InputError: nothing is legal, or nothing fits; the smallest machine that would is named.
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
        raise _nothing(work, machine, config, constraints, least, work_on or (lambda _: work))
    found.sort(key=lambda e: e.seconds)
    keeping = found
    if constraints.via is None:
        keeping = [e for e in found if exact(e.strategy.via, work.dropless)] or found
    best, *others = islice(_distinct(keeping), keep + 1)
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


def _nothing(
    work: Workload,
    machine: Machine,
    config: StepConfig,
    constraints: Constraints,
    least: tuple[float, Strategy] | None,
    work_on: WorkOn,
) -> InputError:
    if least is None and constraints.via is not None:
        free = strategies(work, machine, replace(constraints, via=None), config.train)
        if next(free, None) is not None:
            return InputError(
                f"nothing goes via {constraints.via}",
                where=machine.name,
                expected="experts on several devices"
                + (", and keep every row" if constraints.via == "ragged" else ""),
                found=f"{work.experts} experts, {machine.devices} devices",
            )
    if least is None:
        return InputError(
            "no mesh of this machine divides model and batch",
            where=machine.name,
            found=f"{machine.devices} devices, {work.batch.sequences} sequences",
            hint=f"--batch-tokens {machine.devices * work.batch.sequence_tokens} is a sequence "
            "a device",
        )
    size, strategy = least
    other = _otherwise(work, machine, config, constraints)
    larger = smallest_that_fits(work_on, machine, config, constraints) if other is None else None
    hint = f"{larger.name} is the smallest that would" if larger else "no machine of the kind would"
    if other is not None:
        hint = f"{other} would"
    return InputError(
        "does not fit",
        where=machine.name,
        expected=f"at most {machine.usable_bytes / 1e9:.2f} GB a device",
        found=f"{size / 1e9:.2f} GB with {strategy}, the least",
        hint=hint,
    )


def _otherwise(
    work: Workload, machine: Machine, config: StepConfig, constraints: Constraints
) -> Strategy | None:
    """Return what would fit with fewer constraints on the mesh and on stored parameters."""
    free = [{"dense_weights": None}, {"mesh": None}, {"mesh": None, "dense_weights": None}]
    for change in free:
        relaxed = replace(constraints, **change)
        found = _fitting(work, machine, config, relaxed) if relaxed != constraints else None
        if found is not None:
            return found
    return None


def smallest_that_fits(
    work_on: WorkOn, machine: Machine, config: StepConfig, constraints: Constraints
) -> Machine | None:
    """Return the smallest machine of the same chip on which something fits, or None.

    A mesh that was wished for is no longer one.
    """
    free = replace(constraints, mesh=None)
    larger = (other for other in sizes_of_kind(machine) if other.devices > machine.devices)
    fitting = (other for other in larger if _fitting(work_on(other), other, config, free))
    return next(fitting, None)


def _fitting(
    work: Workload, machine: Machine, config: StepConfig, constraints: Constraints
) -> Strategy | None:
    """Return a strategy that fits, the first that is met."""
    estimator = Estimator(work, machine, config)
    fitting = (
        s
        for s in strategies(work, machine, constraints, config.train)
        if estimator.memory(s).total <= machine.usable_bytes
    )
    return next(fitting, None)


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
