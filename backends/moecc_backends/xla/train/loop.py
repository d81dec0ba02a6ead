"""The training loop as a stream of events."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from math import inf
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from moecc.analysis import parameter_groups
from moecc.errors import InputError, MachineError
from moecc.ir.graph import Graph
from moecc.ir.mesh import parse_mesh
from moecc.ir.structure import fingerprint
from moecc.launch.processes import (
    Phase,
    Watchdog,
    hold_lifeline,
    process_info,
    watchdog_of_environment,
)
from moecc.support.console import say
from moecc.support.ranges import element, has_range
from moecc.support.text import amount
from moecc.train.batches import Batches
from moecc.train.events import (
    Evaluated,
    Event,
    GuardFault,
    Metric,
    Reason,
    Skipped,
    Stepped,
    Stopped,
    TrainJob,
    guard_faults,
)
from moecc.train.graphs import eval_graph, step_spec, train_graph
from moecc.train.recipe import MeshSection, RunSection
from moecc.train.run import (
    Position,
    batch_of,
    locked_run,
    remove_incomplete,
)
from moecc.train.settings import rate_at
from moecc.types import Array, float_type
from moecc.weights.expr import Box
from moecc_backends.xla.import_jax import find_devices, keep_compiled_programs
from moecc_backends.xla.lower.function import sharded_array
from moecc_backends.xla.program import (
    StopAgreement,
    agreed_seconds,
    agreed_token,
    configuration,
    in_precision,
    is_first,
    is_so_in_all,
    join,
    keep_freed_memory,
    machine_errors,
    meet_processes,
    preflight,
)
from moecc_backends.xla.trace.values import NamedArrays, Outputs, PyTree
from moecc_backends.xla.train.checkpoints import (
    RunCheckpoints,
    Saver,
    load,
    slots_of,
    with_moments,
)
from moecc_backends.xla.train.gradients import LOSS_SUM, TAUGHT, TOKENS
from moecc_backends.xla.train.step import (
    PhasedStep,
    TeacherProgram,
    TrainStep,
    shared_step,
    teacher_program,
)

# The training loop, as a stream of events.
#
# Nothing here prints or writes but checkpoints: whoever reads the events does that. An event is
# handled before the loop goes on, so a checkpoint is never ahead of the journal.

State = PyTree

SKIPPED, LIMIT = "guard.skipped", "guard.limit"
"""The metrics of a step: whether its update was left out, and the largest loss that is taken."""


@dataclass
class Loop:
    """A run from its last checkpoint to its end.

    Attributes:
      program: the step.
      feed: its batches.
      checkpoints: where it begins, and where it is saved.
      run: how long, and how often what happens.
      rate: the learning rate of a step, by its number from 0.
      stop: returns why to stop after this step, or None; equal in all processes.
      clock: returns seconds, equal in all processes.
      spread: returns how far experts are apart, from the parameters; None without experts.
      teacher: what the model is distilled from; None without distillation.
      enter: is told which phase begins, for the limits of the watchdog.
    """

    program: PhasedStep
    feed: DeviceFeed
    checkpoints: RunCheckpoints
    run: RunSection
    rate: Callable[[int], float]
    stop: Callable[[], Reason | None]
    clock: Callable[[], float]
    spread: Callable[[NamedArrays], dict[str, list[float]]] | None = None
    teacher: TeacherProgram | None = None
    enter: Callable[[Phase], None] = lambda phase: None

    _state: State = field(init=False, default=None)
    _at: Position = field(init=False, default=Position())
    _best: float | None = field(init=False, default=None)
    _is_unevaluated: bool = field(init=False, default=False)
    _faults: tuple[GuardFault, ...] = field(init=False, default=())
    _saved_seconds: float = field(init=False, default=0.0)
    _structures: set[PyTree] = field(init=False, default_factory=set)

    def events(self) -> Iterator[Event]:
        """Run, and yield what happens.

        Raises:
          MachineError: a checkpoint cannot be written, or the memory of a device is too small.
          InputError: the last checkpoint cannot be read.
        """
        with machine_errors():
            self._begin()
            returned_to: int | None = None
            while (streak := (yield from self._until_streak())) is not None:
                yield from self.checkpoints.wait()
                self._begin()
                if returned_to == self._at.step:
                    yield Stopped(self._at.step, Reason.GUARD, self._faults)
                    return
                returned_to = self._at.step
                self._at = self._at.without(streak)
                yield Skipped(self._at.step, {}, streak[-1], returned_to, streak)

    def _begin(self) -> None:
        self.enter("start")
        self._state = None  # before another one is made
        self._state, self._at, self._best, self._is_unevaluated = self.checkpoints.begin()
        self._saved_seconds = self.clock()

    def _until_streak(self) -> Generator[Event, None, tuple[int, ...] | None]:
        """Run to the end, or until too many steps in a row were skipped: then what to leave out.

        They begin with that of the last step that was taken, whose update led there.
        """
        if self._is_unevaluated:
            outcome = self._evaluate()
            if isinstance(outcome, Reason):
                yield Stopped(self._at.step, outcome)
                return None
            yield outcome
            self.checkpoints.record_loss(self._at.step, outcome.mean)
            self._best = outcome.mean if self._is_best(outcome.mean) else self._best
        streak: list[int] = []
        accepted: list[int] = []
        batch = self._batch(self._at.step) if self._at.step < self.run.steps else {}
        while self._at.step < self.run.steps:
            number, started, worked = self._at.batch, time.monotonic(), time.process_time()
            structure = jax.tree.structure(self._state)  # as each program has its own
            compiles = structure not in self._structures
            self._structures.add(structure)
            self.enter("start" if compiles else "step")
            key = jax.random.fold_in(jax.random.key(self.run.seed), number)
            self._state, metrics = self.program.step(
                self._state, batch, key, self.rate(self._at.step)
            )
            if self._at.step + 1 < self.run.steps:
                # While the devices compute.
                batch = self._batch(self._at.step + 1)
            measured = on_host(metrics)
            skipped, tokens = bool(measured.pop(SKIPPED, 0)), int(np.asarray(measured.pop(TOKENS)))
            limit = float(np.asarray(measured.pop(LIMIT, inf)))
            self._at = self._at.after(0 if skipped else tokens)
            self._state = self.program.entered(self._state, self._at.step)
            if skipped:
                streak.append(number)
                self._faults = guard_faults(measured, limit)
                yield Skipped(self._at.step, measured, number, faults=self._faults)
                if len(streak) >= self.run.guard.skips > 0:
                    return (*accepted, *streak)
            else:
                streak.clear()
                accepted = [number]
                seconds = time.monotonic() - started, time.process_time() - worked
                yield Stepped(
                    self._at.step, measured, self._at.tokens, *seconds, compiles, device_memory()
                )
            if (yield from self._between(bool(streak))):
                return None
        self.enter("save")
        yield from self.checkpoints.wait()
        yield Stopped(self._at.step, Reason.DONE)
        return None

    def _batch(self, step: int) -> Outputs:
        """Return the batch of a step, with the logits of the teacher where there is one."""
        batch = self.feed.train(batch_of(step, self._at.left_out))
        return batch if self.teacher is None else {**batch, **self.teacher(batch, step)}

    def _is_best(self, loss: float | None) -> bool:
        return loss is not None and (self._best is None or loss < self._best)

    def _evaluate(self) -> Evaluated | Reason:
        """Return the held-out losses, or why to stop where the run is told to before the end.

        An evaluation may take longer than the grace period of a scheduler.
        """
        losses, params = {}, self.program.model_params(self._state)
        for name, batches in self.feed.held_out.items():
            self.enter("evaluation")
            loss_sum, tokens, batch = 0.0, 0.0, self.feed.evaluate(name, 0)
            for number in range(batches):
                if (why := self.stop()) is not None:
                    return why
                sums = self.program.evaluate(params, batch)
                if number + 1 < batches:
                    # While the devices compute.
                    batch = self.feed.evaluate(name, number + 1)
                loss_sum += float(sums[LOSS_SUM])
                tokens += float(sums[TOKENS])
            losses[name] = loss_sum / max(tokens, 1.0)
        return Evaluated(self._at.step, losses, self.spread(params) if self.spread else {})

    def _between(self, is_skipped: bool) -> Generator[Event, None, bool]:
        """Evaluate, save and stop where it is time to; return whether the run stops.

        A run that is told to stop saves at once; what then lacks its evaluation is evaluated by
        the run that goes on.
        """
        step, is_last = self._at.step, self._at.step == self.run.steps
        is_unevaluated = is_last or is_due(step, self.run.evaluate_steps)
        is_unevaluated = is_unevaluated and bool(self.feed.held_out)
        outcome = self._evaluate() if is_unevaluated else self.stop()
        why: Reason | None = None
        loss: float | None = None
        if isinstance(outcome, Evaluated):
            yield outcome
            loss, is_unevaluated = outcome.mean, False
        else:
            why = outcome
        is_best = self._is_best(loss)
        # Between skipped steps a checkpoint would be one to which a return is of no use.
        minutes = self.run.save_minutes
        # Agreeing on the time is a collective, which a run without a clock does not need.
        elapsed_seconds = self.clock() - self._saved_seconds if minutes else 0.0
        is_time = any(is_due(step, n) for n in (self.run.save_steps, self.run.export_steps))
        is_time = is_time or 0 < minutes * 60 <= elapsed_seconds
        if is_last or why is not None or (not is_skipped and (is_best or is_time)):
            self._best = loss if is_best else self._best
            self.enter("save")
            yield from self.checkpoints.save(self._state, self._at, loss, is_unevaluated)
            self._saved_seconds = self.clock()
        yield from self.checkpoints.finished()
        if why is None or (is_last and not is_unevaluated):
            return False
        self.enter("save")
        yield from self.checkpoints.wait()
        yield Stopped(step, why)
        return True


def device_memory() -> dict[str, float]:
    """Return the peak of the fullest device of this process, in bytes, where devices count it."""
    counts = [stats for d in jax.local_devices() if (stats := d.memory_stats())]
    peaks = [count["peak_bytes_in_use"] for count in counts if "peak_bytes_in_use" in count]
    return {"memory_bytes": float(max(peaks))} if peaks else {}


def traced(events: Iterator[Event], steps: int, folder: Path) -> Iterator[Event]:
    """Yield events, and write a trace of some steps, after two that compile and warm up.

    Args:
      events: of a run.
      steps: how many are traced; 0: none.
      folder: where the trace goes, as xprof and TensorBoard read it.
    """
    count = 0
    with ExitStack() as tracing:
        for event in events:
            yield event
            count += isinstance(event, Stepped)
            if steps and isinstance(event, Stepped) and count == 2:
                tracing.enter_context(jax.profiler.trace(str(folder)))
            elif count == 2 + steps:
                tracing.close()


def is_due(step: int, every: int) -> bool:
    """Return whether something that is done every so many steps is due; never for 0."""
    return every > 0 and step % every == 0


def on_host(metrics: NamedArrays) -> dict[str, Metric]:
    """Return metrics as numbers, and lists of them."""
    arrays = {name: jnp.asarray(metric) for name, metric in sorted(metrics.items())}
    host = jax.device_get(_by_type(arrays))
    numbers: dict[str, Metric] = {}
    ends = dict.fromkeys(host, 0)
    for name, array in arrays.items():
        key = str(array.dtype)
        begin, ends[key] = ends[key], ends[key] + array.size
        values = [float(x) for x in host[key][begin : ends[key]]]
        numbers[name] = values if array.ndim else values[0]
    return numbers


@jax.jit
def _by_type(metrics: Outputs) -> Outputs:
    """Return the elements of all metrics of a type as one array, in the order of their names.

    A transfer for each of the 400 metrics of 32 sparse layers takes twice the processor time.
    """
    parts: dict[str, list[jax.Array]] = {}
    for _, array in sorted(metrics.items()):
        parts.setdefault(str(array.dtype), []).append(array.reshape(-1))
    return {key: jnp.concatenate(arrays) for key, arrays in parts.items()}


# How far the experts of a layer are apart: nothing at first, where they are copies.

EXPERT, LAYER = "expert", "layer"

SpreadOf = Callable[[NamedArrays], dict[str, list[float]]]


def spread_of(graph: Graph, replicated: Sharding) -> SpreadOf | None:
    """Return a function from parameters to the spread of the experts of each layer, by location.

    For each expert: ‖W − mean of all experts‖ / ‖mean of all experts‖, over all of its matrices.
    None where the graph has no experts.

    Args:
      graph: the graph of a program.
      replicated: where every device of the program has all of an array.
    """
    groups = parameter_groups(graph)
    chosen = {
        name: param.type
        for name, param in graph.params.items()
        if EXPERT in param.type and "router" not in groups[name] and param.users
    }
    if not chosen:
        return None
    places = {name: graph.params[name].loc for name in chosen}

    def squares(params: PyTree) -> dict[str, tuple[jax.Array, jax.Array]]:
        sums: dict[str, tuple[jax.Array, jax.Array]] = {}
        for name, type in chosen.items():
            array = params[name]
            order = [n for n in (LAYER, EXPERT) if n in type]
            wide = jnp.moveaxis(
                array.astype(jnp.float32), [type.names.index(n) for n in order], range(len(order))
            )
            mean = jnp.mean(wide, axis=len(order) - 1, keepdims=True)
            inner = tuple(range(len(order), wide.ndim))
            squared = jnp.sum((wide - mean) ** 2, axis=inner), jnp.sum(mean**2, axis=inner)
            before = sums.get(places[name], (0.0, 0.0))
            sums[places[name]] = (before[0] + squared[0], before[1] + squared[1])
        return sums

    compiled = jax.jit(squares, out_shardings=replicated)

    def spread(params: NamedArrays) -> dict[str, list[float]]:
        spreads: dict[str, list[float]] = {}
        sums = jax.device_get(compiled({name: params[name] for name in chosen}))
        for location, (apart, size) in sums.items():
            with np.errstate(invalid="ignore"):
                ratios = (apart / (size + (size == 0))) ** 0.5
            rows = ratios if ratios.ndim == 2 else ratios[None]
            for at, row in enumerate(rows):
                where = element(location, at) if has_range(location) else location
                spreads[where] = [float(x) for x in row]
        return spreads

    return spread


# Batches on their devices: each process reads the rows of its own.


@dataclass(frozen=True)
class DeviceFeed:
    """The batches of a recipe, on the devices of a program.

    Attributes:
      batches: the batches on the host.
      abstract: shapes, types and shardings of the arrays of a batch; the first axis is the batch.
    """

    batches: Batches
    abstract: Mapping[str, jax.ShapeDtypeStruct]

    @cached_property
    def held_out(self) -> Mapping[str, int]:
        """The number of batches of each held-out text."""
        return {name: evaluation.batches for name, evaluation in self.batches.evaluations.items()}

    def train(self, number: int) -> Outputs:
        """Return a batch of the mixture."""
        return self._placed(lambda rows: self.batches.batch(number, rows))

    def evaluate(self, name: str, number: int) -> Outputs:
        """Return a batch of a held-out text."""
        evaluation = self.batches.evaluations[name]
        return self._placed(lambda rows: evaluation.batch(number, rows))

    def _placed(self, read: Callable[[slice], Mapping[str, Array]]) -> Outputs:
        read_rows = cache(lambda start, stop: read(slice(start, stop)))

        def part(name: str, box: Box) -> Array:
            rows, *inner = box
            array = read_rows(*rows)[name][(slice(None), *(slice(*ends) for ends in inner))]
            return np.asarray(array, self.abstract[name].dtype)

        return {
            name: sharded_array(leaf.shape, leaf.sharding, partial(part, name))
            for name, leaf in self.abstract.items()
        }


# A run on its devices: processes meet, the step is made, and the loop runs over it.


@dataclass
class XlaTraining:
    """A run on its devices; see `moecc.train.events.Training`.

    Attributes:
      job: what is trained.
      program: its step, of each phase.
      saver: writes its checkpoints.
      watchdog: is informed of every step.
      writes: whether this process writes journals and reports.
    """

    job: TrainJob
    program: PhasedStep
    saver: Saver
    watchdog: Watchdog
    writes: bool

    @property
    def first(self) -> TrainStep:
        """The step that it begins with."""
        return self.program.at(0)

    @property
    def devices(self) -> int:
        """How many devices it runs on."""
        return len(_devices(self.job.recipe.mesh))

    def events(self, stop: Callable[[], Reason | None]) -> Iterator[Event]:
        """Run to the end, and yield what happens; see `moecc.train.events.Training.events`."""
        job, run = self.job, self.job.recipe.run
        checkpoints = RunCheckpoints(
            job.run,
            self.first.graph,
            lambda step: self.program.at(step).abstract_state,
            self._start,
            self.saver,
            job.digest,
            job.store if jax.process_count() > 1 else None,
        )
        teacher = None
        if job.teacher is not None:
            with job.teacher() as source:
                teacher = teacher_program(source, job.recipe, self.first)
        abstract = {n: leaf for n, leaf in self.first.abstract_batch.items() if n not in TAUGHT}
        loop = Loop(
            self.program,
            DeviceFeed(job.batches, abstract),
            checkpoints,
            run,
            lambda step: rate_at(job.recipe.optimizer, step, run.steps),
            StopAgreement(stop),
            agreed_seconds,
            spread_of(self.first.graph, self.first.where.whole),
            teacher,
            self.watchdog.enter,
        )
        for event in traced(loop.events(), job.traced_steps, job.run / "profile"):
            self.watchdog.beat(type(event).__name__)
            yield event

    def _start(self) -> tuple[PyTree, Position]:
        """Return the state before the first step."""
        program = self.first
        abstract = program.abstract_state
        params: Mapping[str, jax.ShapeDtypeStruct] = {**abstract["params"], **abstract["bias"]}
        with self.job.begin() as beginning:
            loaded = load(program.graph, beginning.weights, beginning.read, params)
            state = program.init(loaded)
            if beginning.moments:
                slots = slots_of(program.graph, program.abstract_state)
                state = with_moments(state, slots, beginning.moments, beginning.read)
        return state, Position()


@contextmanager
def training(job: TrainJob) -> Iterator[XlaTraining]:
    """Bring a run onto its devices; see `moecc.train.events.Trainer.train`.

    Raises:
      InputError: the mesh does not suit the model or the devices; processes differ.
      MachineError: an extra is missing, or the processes do not meet.
    """
    process = process_info()
    if process is not None:
        hold_lifeline()
        join(process, is_told_to_stop=True)
    keep_freed_memory()
    find_devices()
    keep_compiled_programs()
    run = job.recipe.run
    names = (run.dtype, run.weight_dtype, run.reduce_dtype)
    types = (float_type(name) for name in names if name)
    with in_precision(*types), watchdog_of_environment() as watchdog:
        watchdog.beat("all processes have met")
        devices, count = _devices(job.recipe.mesh), jax.device_count()
        if len(devices) < count:
            say(
                f"remark: {len(devices)} of {count} devices compute; "
                f'mesh.mesh = "data={count}" takes all'
            )
        spec = step_spec(job.graph, job.recipe, devices[0].platform)
        judge = eval_graph(job.graph, job.recipe)
        program = shared_step(train_graph(job.graph, job.recipe), spec, devices, judge)
        preflight(
            configuration(
                graph=fingerprint(job.graph)[:16],
                recipe=job.digest,
                data=job.batches.digests["order"],
                mesh=str(job.recipe.mesh),
            )
        )
        program.at(0).check()
        with _run_folder(job) as job:
            saver = Saver(job.run, job.recipe.run.keep, store=job.store)
            try:
                yield XlaTraining(job, program, saver, watchdog, is_first())
            finally:
                saver.close()


@contextmanager
def _run_folder(job: TrainJob) -> Iterator[TrainJob]:
    """Make the folder of a run, or take it over, in the first process; the others wait for it.

    Yields the job with the folder of this process: of a run in a store each has one of its own.

    Raises:
      MachineError: the processes do not share the folder of a run that is in no store.
    """
    token = agreed_token()
    if job.store is not None and jax.process_count() > 1:
        job = replace(job, run=job.store.enter(jax.process_index(), token))
    # An earlier run may have left a folder of this name on a disk of one machine alone.
    sign = job.run / f".shared-{token}"
    with ExitStack() as opened:
        if is_first():
            job.create()
            opened.enter_context(locked_run(job.run))
            remove_incomplete(job.run)
            sign.touch()
        meet_processes("moecc made the folder")
        is_shared = is_so_in_all(job.store is not None or sign.exists())
        if is_first():
            sign.unlink()
        if not is_shared:
            raise MachineError(
                "the processes do not share the folder of the run",
                where=job.run,
                hint="use a shared file system, or a store: --out s3://BUCKET/RUN",
            )
        yield job


def _devices(section: MeshSection) -> list[jax.Device]:
    """Return the devices of a mesh, in its order.

    Raises:
      InputError: there are others; in several processes every device has to be in the mesh.
    """
    available = jax.devices()
    wanted, processes = parse_mesh(section.mesh).devices if section.mesh else 1, jax.process_count()
    of_all = f'mesh.mesh = "data={len(available)}"'
    if wanted > len(available):
        raise InputError(
            "the mesh has more devices than there are",
            where="mesh.mesh",
            expected=f"at most {amount(len(available), 'device')}",
            found=str(wanted),
            hint=f"XLA_FLAGS=--xla_force_host_platform_device_count={wanted} makes a CPU many"
            if available[0].platform == "cpu" and processes == 1
            else f"{of_all} takes them",
        )
    if processes > 1 and wanted != len(available):
        raise InputError(
            "the mesh leaves devices out, and several processes use all of them",
            where="mesh.mesh",
            expected=f"{amount(len(available), 'device')}, of {processes} processes",
            found=str(wanted),
            hint=f"{of_all} takes them",
        )
    return available[:wanted]
