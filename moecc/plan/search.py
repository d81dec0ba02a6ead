"""The search: every mesh, exchange and rematerialisation that fits, the fastest first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

from moecc.errors import InputError, Problem, raise_problems
from moecc.ir.mesh import Mesh, nearest_divisor
from moecc.plan.collectives import SLICED, is_exact
from moecc.plan.machines import Machine, sizes_of_kind
from moecc.plan.step import AXES, StepConfig, Strategy, as_option, mesh_text
from moecc.plan.time import Estimate, Estimator
from moecc.plan.workload import Batch, Workload
from moecc.sharding.layout import DENSE_WEIGHTS, Layout
from moecc.sharding.rules import axis_problems, mesh_axes, read_layouts
from moecc.sharding.vias import LOCAL, WAYS, Slots, Via, refusals
from moecc.support.text import amount, size_text
from moecc.support.untyped import JsonDict

# The layouts that a plan tries, and why a layout does not suit a model.


def layouts(mesh: Mesh, work: Workload) -> Iterator[Layout]:
    """Yield the layouts of `work` that the names of the mesh's axes stand for."""
    for dense, replicated in product(DENSE_WEIGHTS, (False, True)):
        layout = Layout(mesh, work.experts, dense, replicated)
        apart = layout.has_expert_axis
        if (replicated and not apart) or (
            dense == "split" and not (apart or "data" in layout.sizes)
        ):
            continue
        if not any(problems(layout, work)):
            yield layout


def problems(layout: Layout, work: Workload) -> Iterator[Problem]:
    """Yield why a layout does not suit `work`: the axis, its size, the nearest that would."""
    where = f"mesh {mesh_text(layout.sizes)}"
    yield from batch_problems(layout, work.batch)
    for name, size in work.tensor_sizes.items():
        parts = layout.shards[name]
        if size % parts:
            yield Problem(
                f"{' x '.join(layout.tensor_axes)} does not divide the axis {name}",
                where,
                f"a divisor of {size}",
                str(parts),
                f"{nearest_divisor(size, parts)} would",
            )
    if not set(layout.split(layout.sequence_axes)) <= set(layout.tensor_axes):
        yield Problem(
            "attention over a sequence in parts is not lowered: each device would do all of it",
            where,
            "a mesh axis that shards heads, too: tensor-parallel,sequence-parallel",
            " x ".join(layout.sequence_axes),
        )
    for name, size in layout.sizes.items():
        if size > 1 and name not in layout.used:
            dense = name == "expert" and not work.experts
            yield Problem(
                "the mesh has an axis expert, and the model has no experts" if dense
                else f"nothing is sharded over the mesh axis {name!r}",
                where,
            )  # fmt: skip
    experts = layout.shards["expert"]
    if work.experts and work.experts % experts:
        yield Problem(
            f"{' x '.join(layout.expert_axes)} does not divide the experts"
            if experts < work.experts
            else "more devices for experts than experts",
            where,
            f"a divisor of {work.experts}",
            str(experts),
            f"{nearest_divisor(work.experts, experts)} would",
        )  # fmt: skip


def batch_problems(layout: Layout, batch: Batch) -> Iterator[Problem]:
    """Yield why a batch, whatever the model, cannot be sharded so."""
    where = f"mesh {mesh_text(layout.sizes)}"
    shards, parts = layout.shards["batch"], layout.shards["seq"]
    if batch.sequences % shards:
        yield Problem(
            f"{' x '.join(layout.batch_axes)} does not divide the batch",
            where,
            f"a divisor of {amount(batch.sequences, 'sequence')}",
            str(shards),
            f"{nearest_divisor(batch.sequences, shards)} would",
        )
    for name, size in batch.lengths:
        if size % parts:
            yield Problem(
                f"{' x '.join(layout.sequence_axes)} does not divide the sequences",
                where,
                f"a divisor of {amount(size, 'token')} ({name})",
                str(parts),
                f"{nearest_divisor(size, parts)} would",
            )


# The meshes of a machine: a grid of all its devices, whose axes have the names of layouts.

MOST_TENSOR = 64
"""The search splits neurons over at most so many devices; a mesh that is given may have more."""


def check_devices(mesh: Mesh, devices: int, machine: str) -> None:
    """Check that a mesh has as many devices as a machine.

    Raises:
      InputError: it has more or fewer; the size of its last axis that would do is suggested.
    """
    if mesh.devices == devices:
        return
    name, size = mesh.axes[-1]
    remaining = mesh.devices // size
    hint = f"{name}={devices // remaining} would" if devices % remaining == 0 else None
    if mesh.names == ("expert",) and devices % size == 0:
        hint = f"fsdp={devices // size},expert={size} would"
    raise InputError(
        "the mesh and the machine have different numbers of devices",
        where=f"mesh {mesh_text(mesh.sizes)}",
        expected=f"{devices} devices of {machine}",
        found=str(mesh.devices),
        hint=hint,
    )


def searched_meshes(devices: int, experts: int, rules: Sequence[str] | None) -> Iterator[Mesh]:
    """Yield the meshes that a search tries, over the axes of `rules` if there are some.

    Those equivalent up to renaming axes are skipped.
    """
    if rules is not None:
        # Layouts reject meshes with an axis over which nothing is sharded.
        yield from meshes(devices, mesh_axes(rules))
        return
    for mesh in meshes(devices):
        data = mesh.sizes.get("data", 1)
        if mesh.sizes.get("model", 1) > MOST_TENSOR:
            continue
        # Experts would be sharded over data, as they are over an axis of their own.
        if experts and data > 1 and "expert" not in mesh.names and experts % data == 0:
            continue
        yield mesh


def meshes(devices: int, names: Sequence[str] = AXES) -> Iterator[Mesh]:
    """Yield every mesh of `devices` devices over axes of `names`; one device is ``data:1``."""
    for sizes in _products(devices, len(names)):
        axes = tuple((n, s) for n, s in zip(names, sizes, strict=True) if s > 1)
        yield Mesh(axes or ((names[0], 1),))


def _products(of: int, count: int) -> Iterator[tuple[int, ...]]:
    """Yield every tuple of `count` numbers whose product is `of`."""
    if count == 1:
        yield (of,)
        return
    for size in (d for d in range(1, of + 1) if of % d == 0):
        for remaining in _products(of // size, count - 1):
            yield (size, *remaining)


_NEEDS = {
    "ragged": "ragged is for models without a capacity",
    "hierarchical": "hierarchical is for experts on two mesh axes: --rules expert-hierarchical "
    "--mesh far=8,near=8, say",
}


def strategies(work: Workload, machine: Machine, config: StepConfig) -> Iterator[Strategy]:
    """Yield every strategy that is legal and agrees with the settings that `config` fixes."""
    remats = work.remats if config.remat is None else (config.remat,)
    for layout in _layouts(work, machine, config):
        for via in legal_vias(layout, work):
            if config.via not in (None, via) or (via == "replicated") != layout.replicated:
                continue
            for remat in remats if config.train else ("none",):
                yield Strategy(layout, via, dispatch_of(via, work), remat)
                if via in SLICED and layout.tensor_axes:
                    yield Strategy(layout, via, dispatch_of(via, work), remat, sliced=True)


def dispatch_of(via: str, work: Workload) -> str:
    """Return how rows reach experts: in groups of any size, or in slots, which a capacity has."""
    return "grouped" if work.dropless and via != "capacity" else "index"


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


def _layouts(work: Workload, machine: Machine, config: StepConfig) -> Iterator[Layout]:
    tried: Iterable[Mesh] = searched_meshes(machine.devices, work.experts, config.layout_names)
    for mesh in tried if config.device_mesh is None else (config.device_mesh,):
        if config.layout_names is None:
            candidates = layouts(mesh, work)
            yield from (x for x in candidates if config.dense_weights in (None, x.dense_weights))
            continue
        layout = Layout.ruled(mesh, work.experts, config.layout_names)
        if not any(problems(layout, work)):
            yield layout


def check_constraints(work: Workload, machine: Machine, config: StepConfig) -> None:
    """Check the settings that the user fixed.

    Raises:
      InputError: the mesh has another number of devices, or does not divide what it splits; the
        exchange does not suit model or mesh; a rule names an axis that no parameter has.
    """
    if config.via == "hierarchical" and config.layout_names is None:
        raise InputError(
            "by its names, a mesh shards experts over one axis", hint=_NEEDS["hierarchical"]
        )
    if config.layout_names is not None:
        axes = {name for weight, _ in work.weights for name in weight.shape.names}
        raise_problems(axis_problems(read_layouts(config.layout_names), axes))
    if config.device_mesh is None:
        return
    check_devices(config.device_mesh, machine.devices, machine.name)
    if config.layout_names is None:
        layout = Layout(config.device_mesh, work.experts, "whole", config.via == "replicated")
    else:
        layout = Layout.ruled(config.device_mesh, work.experts, config.layout_names)
    raise_problems(problems(layout, work))
    devices, fitting = layout.shards["expert"], legal_vias(layout, work)
    if config.via is not None and config.via not in fitting:
        is_local = fitting == [LOCAL]
        raise InputError(
            f"experts on {amount(devices, 'device')} cannot be reached via {config.via}",
            where=f"mesh {mesh_text(config.device_mesh.sizes)}",
            expected="no --via, or experts on several devices" if is_local else ", ".join(fitting),
            hint="an axis for experts is expert=8, say" if is_local else _NEEDS.get(config.via),
        )


# What would fit where a plan does not: other options first, then a larger machine.
#
# Each is planned anew before it is named.

WorkOn = Callable[[Machine, int], Workload]
"""The work on a machine in so many micro-batches: a batch may grow with the devices."""

SpellOption = Callable[[str, str], str]
"""Returns the option that sets a field to a new value."""

MOST_PARTS = 256


@dataclass(frozen=True)
class PlanQuery:
    """The question to a plan.

    Attributes:
      machine: where.
      config: the settings of the step.
      work: the model and its micro-batch.
      work_on: the work elsewhere, or in other parts.
      spelling: how other options are named.
      share: of a device's memory, what a plan may need.
    """

    machine: Machine
    config: StepConfig
    work: Workload
    work_on: WorkOn
    spelling: SpellOption = as_option
    share: float = 1.0

    def changed(self, change: JsonDict) -> PlanQuery:
        """Return what is asked after a change."""
        work = self.work
        if "micro_batches" in change:
            work = self.work_on(self.machine, change["micro_batches"])
        return replace(self, config=replace(self.config, **change), work=work)

    def on(self, machine: Machine) -> PlanQuery:
        """Return what is asked of another machine, on any mesh."""
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


def nothing_fits(asked: PlanQuery, least: tuple[float, Strategy] | None) -> InputError:
    """Return the error where nothing fits; `least` needs the least, None where none is legal."""
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


def _nothing_legal(asked: PlanQuery) -> InputError:
    machine, config, work = asked.machine, asked.config, asked.work
    free = strategies(work, machine, replace(config, via=None))
    if config.via is not None and next(free, None) is not None:
        return InputError(
            f"nothing goes via {config.via}",
            where=machine.name,
            expected="experts on several devices"
            + (", and a model that keeps every row" if config.via == "ragged" else ""),
            found=f"{amount(work.experts, 'expert')}, {amount(machine.devices, 'device')}",
        )
    return InputError(
        "no mesh of this machine divides model and batch",
        where=machine.name,
        found=f"{amount(machine.devices, 'device')}, {amount(work.batch.sequences, 'sequence')}"
        + (f", {amount(work.experts, 'expert')}" if work.experts else ""),
        hint=_undivided(asked),
    )


def _undivided(asked: PlanQuery) -> str:
    """Return what to change where no mesh is legal: the batch, if it is that, or the devices."""
    batch, devices = asked.work.batch, asked.machine.devices * asked.config.micro_batches
    if batch.sequences % devices:
        return f"--batch-tokens {devices * batch.sequence_tokens} is a sequence a device"
    return "fewer devices" if asked.config.rules is None else "fewer devices, or other --rules"


def way_out(asked: PlanQuery) -> str:
    """Return what would fit, as options of the command line, then the smallest machine."""
    options = remedies(asked)
    larger = smallest_that_fits(asked)
    text = f"{' or '.join(options)} would" if options else ""
    if larger is None:
        return text or "no machine of the kind would"
    named = f"{larger.name} is the smallest that would"
    return f"{text}; {named}" if text else named


def remedies(asked: PlanQuery) -> list[str]:
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


def _changes(asked: PlanQuery) -> Iterator[JsonDict]:
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


def _tried(asked: PlanQuery, change: JsonDict) -> str | None:
    """Return the options of a change under which something fits, or None."""
    if "micro_batches" in change:
        return _in_parts(asked, {})
    strategy = asked.changed(change).fitting()
    return None if strategy is None else _options(asked, change, strategy)


def _in_parts(asked: PlanQuery, change: JsonDict) -> str | None:
    """Return the fewest micro-batches with which something fits after a change, or None."""
    parts = asked.config.micro_batches * 2
    sequences = asked.work.batch.sequences * asked.config.micro_batches
    while parts <= MOST_PARTS and sequences % parts == 0:
        tried = {**change, "micro_batches": parts}
        strategy = asked.changed(tried).fitting()
        if strategy is not None:
            return _options(asked, tried, strategy)
        parts *= 2
    return None


def _options(asked: PlanQuery, change: JsonDict, strategy: Strategy) -> str:
    """Return the options that stand for a change, and for what was found."""
    layout = strategy.layout
    said = {n: str(v) for n, v in change.items()}
    if "mesh" in change:
        said["mesh"] = mesh_text(layout.sizes)
    if "dense_weights" in change or ("mesh" in change and layout.dense_weights == "split"):
        said["dense_weights"] = layout.dense_weights
    return " ".join(asked.spelling(name, text) for name, text in said.items())


def smallest_that_fits(asked: PlanQuery) -> Machine | None:
    """Return the smallest machine of the same chip on which something fits, or None.

    A mesh that was wished for is no longer one.
    """
    larger = (m for m in sizes_of_kind(asked.machine) if m.devices > asked.machine.devices)
    return next((m for m in larger if asked.on(m).fitting()), None)


@dataclass(frozen=True)
class Ranking:
    """The results of a search.

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
    lossy: Estimate | None
    searched: tuple[Estimate, ...]


def search(
    work: Workload,
    machine: Machine,
    config: StepConfig,
    work_on: WorkOn,
    keep: int = 5,
    spelling: SpellOption = as_option,
) -> Ranking:
    """Rank the strategies for `work` on `machine`.

    Args:
      work: the model and its batch.
      machine: where.
      config: the settings of the step; the search decides those that are None.
      work_on: the work on another machine, or in other micro-batches.
      keep: how many beside the best.
      spelling: how options that would fit are named.

    Raises:
      InputError: nothing is legal, or nothing fits; options that would, and the smallest machine
        that would, are named.
    """
    check_constraints(work, machine, config)
    estimator = Estimator(work, machine, config)
    tried, fitting, least = 0, [], None
    for strategy in strategies(work, machine, config):
        tried += 1
        needed = estimator.memory(strategy)
        total = needed.total
        if total <= machine.usable_bytes:
            fitting.append(estimator.estimate(strategy, needed))
        elif least is None or total < least[0]:
            least = (total, strategy)
    if not fitting:
        raise nothing_fits(PlanQuery(machine, config, work, work_on, spelling), least)
    fitting.sort(key=lambda e: e.seconds)
    keeping = fitting
    if config.via is None:
        keeping = [e for e in fitting if is_exact(e.strategy.via, work.dropless)] or fitting
    best, *others = _distinct(keeping)
    # Meshes that differ in their sizes alone would fill the list with one idea.
    first = {_kind(best): best}
    for estimate in others:
        first.setdefault(_kind(estimate), estimate)
    kinds = [e for e in first.values() if e is not best]
    chosen = set(map(id, kinds))
    more = [e for e in others if id(e) not in chosen]
    others = sorted([*kinds, *more][:keep], key=lambda e: e.seconds)
    lossy = fitting[0] if fitting[0] is not best else None
    return Ranking(best, tuple(others), tried, len(fitting), lossy, tuple(fitting))


def _distinct(estimates: list[Estimate]) -> Iterator[Estimate]:
    """Yield those that are not an earlier one with other names for its axes."""
    seen: set[tuple[float, float]] = set()
    for estimate in estimates:
        figures = (estimate.seconds, estimate.memory.total)
        if figures not in seen:
            seen.add(figures)
            yield estimate


def _kind(estimate: Estimate) -> tuple[frozenset[str], str, str]:
    strategy = estimate.strategy
    axes = frozenset(name for name, size in strategy.layout.mesh.sizes.items() if size > 1)
    return axes, strategy.via, strategy.remat


def why_slower(slower: Estimate, best: Estimate) -> str:
    """Return why `slower` loses to `best`: what it takes longer for."""
    more = {k: s - best.by_kind[k] for k, s in slower.by_kind.items()}
    kind = max(more, key=lambda k: more[k])
    words = {"local": "computation", "exchange": "waiting for data", "parameters": "parameters"}
    text = f"{words[kind]} takes {seconds_text(max(more[kind], 0.0))} more"
    if kind != "local":
        return f"{text}: {_heaviest(slower, waits=kind == 'exchange')}"
    if slower.flops > best.flops * 1.01:
        return f"{text}: {slower.flops / best.flops:.2f} times the FLOPs"
    return f"{text}: {_slowest(slower, best)}"


def _slowest(slower: Estimate, best: Estimate) -> str:
    """Return the part whose computation and memory take the most longer than in `best`."""
    before = {p.name: p.local_seconds for p in best.parts}
    return max(slower.parts, key=lambda p: p.local_seconds - before.get(p.name, 0.0)).name


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
