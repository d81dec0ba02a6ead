"""A run on its devices: processes meet, the step is made, and the loop runs over it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils

from moecc.errors import InputError
from moecc.ir.mesh import parse_mesh
from moecc.ir.structure import fingerprint
from moecc.launch.member import Watchdog, hold_lifeline, watchdog_of_environment
from moecc.launch.process_info import process_info
from moecc.steps.recipes import eval_graph, step_spec, train_graph
from moecc.support.parse_units import float_type
from moecc.support.text import amount
from moecc.train.events import Event, Reason
from moecc.train.job import TrainJob
from moecc.train.position import Position
from moecc.train.recipe import MeshSection, RunSection
from moecc.train.run_folder import locked_run, remove_incomplete
from moecc.train.schedule import rate_at
from moecc.types.dtypes import DType
from moecc_backends.xla.import_jax import find_devices
from moecc_backends.xla.run.host_memory import keep_freed_memory
from moecc_backends.xla.run.precision import in_precision
from moecc_backends.xla.run.processes import configuration, is_first, join, preflight
from moecc_backends.xla.trace.typed_jax import PyTree
from moecc_backends.xla.train.checkpoints import RunCheckpoints
from moecc_backends.xla.train.compile_cache import keep_compiled_programs
from moecc_backends.xla.train.expert_spread import spread_of
from moecc_backends.xla.train.feed import DeviceFeed
from moecc_backends.xla.train.loop import Loop
from moecc_backends.xla.train.phased import PhasedStep, make_phased_step
from moecc_backends.xla.train.saving import Saver
from moecc_backends.xla.train.step import TrainStep
from moecc_backends.xla.train.tensors import load, slots_of, with_moments

_REASONS = (None, Reason.TERMINATED, Reason.INTERRUPTED)


@dataclass
class XlaTraining:
    """A run on its devices; see `moecc.train.job.Training`.

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
        """Run to the end, and yield what happens; see `moecc.train.job.Training.events`."""
        job, run = self.job, self.job.recipe.run
        checkpoints = RunCheckpoints(
            job.run, self.first.graph, lambda step: self.program.at(step).abstract_state,
            self._start, self.saver, job.digest,
        )  # fmt: skip
        loop = Loop(
            self.program,
            DeviceFeed(job.batches, self.first.abstract_batch),
            checkpoints,
            run,
            lambda step: rate_at(job.recipe.optimizer, step, run.steps),
            lambda: agreed_reason(stop()),
            agreed_seconds,
            spread_of(self.first.graph, self.first.where.whole),
        )
        for event in loop.events():
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
    """Bring a run onto its devices; see `moecc.train.job.Trainer.train`.

    Raises:
      InputError: the mesh does not suit the model or the devices; processes differ.
      MachineError: an extra is missing, or the processes do not meet.
    """
    process = process_info()
    if process is not None:
        hold_lifeline()
        join(process)
    keep_freed_memory()
    find_devices()
    keep_compiled_programs()
    with in_precision(*_types(job.recipe.run)), watchdog_of_environment() as watchdog:
        watchdog.beat("all processes have met")
        program = _program(job)
        preflight(
            configuration(
                graph=fingerprint(job.graph)[:16],
                recipe=job.digest,
                data=job.batches.digests["order"],
                mesh=str(job.recipe.mesh),
            )
        )
        program.at(0).check()
        with _own_folder(job):
            saver = Saver(job.run, job.recipe.run.keep)
            try:
                yield XlaTraining(job, program, saver, watchdog, is_first())
            finally:
                saver.close()


def _types(run: RunSection) -> Iterator[DType]:
    """Yield the types that a run computes in and stores."""
    yield from (
        float_type(name) for name in (run.dtype, run.weight_dtype, run.reduce_dtype) if name
    )


@contextmanager
def _own_folder(job: TrainJob) -> Iterator[None]:
    """Make the folder of a run, or take it over, in the first process; the others wait for it."""
    if not is_first():
        _meet("moecc made the folder")
        yield
        return
    job.create()
    with locked_run(job.run):
        remove_incomplete(job.run)
        _meet("moecc made the folder")
        yield


def _program(job: TrainJob) -> PhasedStep:
    devices = _devices(job.recipe.mesh)
    spec = step_spec(job.graph, job.recipe, devices[0].platform)
    judge = eval_graph(job.graph, job.recipe)
    return make_phased_step(train_graph(job.graph, job.recipe), spec, devices, judge)


def _devices(section: MeshSection) -> list[jax.Device]:
    """Return the devices of a mesh, in its order.

    Raises:
      InputError: there are others; in several processes every device has to be in the mesh.
    """
    found = jax.devices()
    wanted, processes = parse_mesh(section.mesh).devices if section.mesh else 1, jax.process_count()
    if wanted > len(found):
        raise InputError(
            "the mesh has more devices than there are", where="mesh.mesh",
            expected=f"at most {amount(len(found), 'device')}", found=str(wanted),
            hint=f"XLA_FLAGS=--xla_force_host_platform_device_count={wanted} makes a CPU many"
            if found[0].platform == "cpu" and processes == 1 else f"{_of_all(found)} takes them",
        )  # fmt: skip
    if processes > 1 and wanted != len(found):
        raise InputError(
            "the mesh leaves devices out, and several processes use all of them", where="mesh.mesh",
            expected=f"{amount(len(found), 'device')}, of {processes} processes", found=str(wanted),
            hint=f"{_of_all(found)} takes them",
        )  # fmt: skip
    return found[:wanted]


def _of_all(devices: Sequence[jax.Device]) -> str:
    return f'mesh.mesh = "data={len(devices)}"'


def agreed_reason(reason: Reason | None) -> Reason | None:
    """Return why to stop, if any process says so; the same in all of them."""
    if jax.process_count() == 1:
        return reason
    number = np.int32(_REASONS.index(reason))
    return _REASONS[int(np.max(multihost_utils.process_allgather(number)))]


def agreed_seconds() -> float:
    """Return the seconds of the first process's clock, in all of them."""
    now = time.monotonic()
    if jax.process_count() == 1:
        return now
    return float(multihost_utils.broadcast_one_to_all(np.float32(now)))


def _meet(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
