"""The events of a training loop, which command line, notebooks and tests read as a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum
from math import inf, isfinite, log
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from moecc.ir.conventions import METRIC
from moecc.ir.graph import Graph
from moecc.support.extras import require
from moecc.support.untyped import Json, JsonDict
from moecc.train.batches import Batches
from moecc.train.recipe import Recipe
from moecc.train.state import Weights
from moecc.weights.evaluate import TensorReader

Metric = float | list[float]
"""A number, or one for each expert."""


class Reason(Enum):
    """Why a loop ended."""

    DONE = "done"
    TERMINATED = "terminated"
    INTERRUPTED = "interrupted"
    GUARD = "guard"


@dataclass(frozen=True)
class Stepped:
    """A step was made.

    Attributes:
      step: how many are done, this one included.
      metrics: what was measured, by name; the same on any machine of one kind.
      tokens: trained on so far, padding left out.
      seconds: this step took.
      processor_seconds: of all threads of this process, in that time.
      compiles: whether it is the first step of a program in this run, which compiles it.
      speed: further figures that depend on the machine, by name: ``memory_bytes``, the peak of the
        fullest device of this process so far, and those of `StepWork`.
    """

    step: int
    metrics: Mapping[str, Metric]
    tokens: int
    seconds: float
    processor_seconds: float = 0.0
    compiles: bool = False
    speed: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StepWork:
    """The work of a step, and the bounds that a machine and a plan set to its time.

    Attributes:
      flops: the products of all devices, forward and backward, without rematerialisation.
      peak_flops: FLOP/s of all devices together; None where the machine is not known.
      planned_seconds: of a step, by a plan; None without one.
    """

    flops: float
    peak_flops: float | None = None
    planned_seconds: float | None = None

    def figures(self, seconds: float) -> dict[str, float]:
        """Return FLOP/s, the model FLOP utilisation and the planned time, where they are known."""
        figures = {"flops_per_second": self.flops / seconds}
        if self.peak_flops is not None:
            figures["mfu"] = figures["flops_per_second"] / self.peak_flops
        if self.planned_seconds is not None:
            figures["planned_seconds"] = self.planned_seconds
        return figures


@dataclass(frozen=True)
class GuardFault:
    """A quantity of a step that the guard rejects.

    Attributes:
      quantity: ``loss`` or ``gradient_norm``, as the metric is called.
      value: of the step.
      limit: the largest loss that is taken; None where the value is not finite.
    """

    quantity: str
    value: float
    limit: float | None = None

    def __str__(self) -> str:
        name = self.quantity.replace("_", " ")
        if self.limit is None:
            return f"{name} {self.value}, where a finite number is needed"
        return f"{name} {self.value:.6g}, above its limit {self.limit:.6g}"

    def as_dict(self) -> JsonDict:
        """Return the fault as the journal has it: a value that is not finite is a text."""
        value = self.value if isfinite(self.value) else str(self.value)
        return {"quantity": self.quantity, "value": value, "limit": self.limit}


def guard_faults(metrics: Mapping[str, Metric], limit: float) -> tuple[GuardFault, ...]:
    """Return which quantities of a step the guard rejects.

    Args:
      metrics: of the step.
      limit: the largest loss that is taken.
    """
    faults = []
    for quantity, largest in (("loss", limit), ("gradient_norm", inf)):
        value = metrics.get(quantity)
        if not isinstance(value, float):
            continue
        if not isfinite(value):
            faults.append(GuardFault(quantity, value))
        elif value > largest:
            faults.append(GuardFault(quantity, value, largest))
    return tuple(faults)


@dataclass(frozen=True)
class Skipped:
    """A step was made and its update left out by the guard.

    Attributes:
      step: how many are done, this one included.
      metrics: what was measured.
      batch: the number of the batch.
      back_to: the step to which training returned; None where it goes on.
      left_out: the batches that are left out from there on.
      faults: why it was skipped.
    """

    step: int
    metrics: Mapping[str, Metric]
    batch: int
    back_to: int | None = None
    left_out: tuple[int, ...] = ()
    faults: tuple[GuardFault, ...] = ()


@dataclass(frozen=True)
class Evaluated:
    """Held-out losses were measured.

    Attributes:
      step: how many are done.
      losses: in nats a token, by the name of the text.
      spread: how far each expert of a layer is from the mean of all, by location: 0 for copies.
    """

    step: int
    losses: Mapping[str, float]
    spread: Mapping[str, list[float]] = field(default_factory=dict)

    @property
    def mean(self) -> float | None:
        """The mean over the texts; None where it is not finite, and no step the best."""
        mean = sum(self.losses.values()) / len(self.losses)
        return mean if isfinite(mean) else None


@dataclass(frozen=True)
class Saved:
    """A checkpoint is complete.

    Attributes:
      step: steps done.
      folder: where it is.
      best: whether no other has a lower held-out loss.
      seconds: from the request until it was complete.
    """

    step: int
    folder: Path
    best: bool
    seconds: float


@dataclass(frozen=True)
class Exported:
    """An export was written, read back and compared."""

    step: int
    folder: Path


@dataclass(frozen=True)
class Stopped:
    """The loop ended after `step` steps, for `reason`; the guard names the last step's faults."""

    step: int
    reason: Reason
    faults: tuple[GuardFault, ...] = ()


Event = Stepped | Skipped | Evaluated | Saved | Exported | Stopped


# What a backend trains: a recipe, a model, its data and where it begins; and what comes of it.


@dataclass(frozen=True)
class Beginning:
    """The beginning of a run: parameters and moments before the first step.

    Attributes:
      weights: how each parameter is made, by its canonical name.
      read: reads the tensors of the source.
      moments: how moments are made that are carried over, by their names in a state.
    """

    weights: Weights
    read: TensorReader
    moments: Weights


@dataclass(frozen=True)
class Teacher:
    """The source of a run, before the pipeline.

    Attributes:
      graph: its canonical graph.
      weights: how each parameter is made, by its canonical name.
      read: reads its tensors.
    """

    graph: Graph
    weights: Weights
    read: TensorReader


class RunStore(Protocol):
    """The store of a run; each of several processes has a folder of its own, shared with none.

    Methods that reach the store raise MachineError where it denies access or does not answer, and
    InputError where another process took the run over.
    """

    def enter(self, process: int, writer: str) -> Path:
        """Return the folder of one of several processes, which `writer` names in the claim."""
        ...

    def fetch(self) -> None:
        """Bring the last step in the store to the folder of this process, where files lack."""
        ...

    def complete(self, number: int) -> None:
        """Bring the arrays of a step that other processes uploaded to this folder."""
        ...

    def put_part(self, number: int) -> None:
        """Upload what a process that is not the first wrote of a step, and remove it here."""
        ...

    def get_parts(self, number: int, processes: int) -> None:
        """Bring the records of what the other processes uploaded of a step to this folder."""
        ...

    def put_record(self, number: int) -> None:
        """Upload the record of a step again, to which its evaluation was added."""
        ...

    def put_run(self) -> None:
        """Upload what is new in the folder of the first process, each step with its record last."""
        ...


@dataclass(frozen=True)
class TrainJob:
    """A run that is to begin, or to go on.

    Attributes:
      run: its folder.
      recipe: what decides it.
      digest: of the recipe.
      graph: the canonical graph of the model.
      batches: its data.
      create: makes the folder; it is there already where the run goes on.
      begin: opens what the first step begins from, where nothing is saved yet.
      traced_steps: how many steps are traced for xprof, in the folder ``profile`` of the run.
      teacher: opens the source that the model is distilled from; None without distillation.
      store: of a run in a store; None of one in a folder, which all processes share.
    """

    run: Path
    recipe: Recipe
    digest: str
    graph: Graph
    batches: Batches
    create: Callable[[], None]
    begin: Callable[[], AbstractContextManager[Beginning]]
    traced_steps: int = 0
    teacher: Callable[[], AbstractContextManager[Teacher]] | None = None
    store: RunStore | None = None


class Training(Protocol):
    """A run on its devices."""

    @property
    def writes(self) -> bool:
        """Whether this process writes journals and reports; among several, one does."""
        ...

    @property
    def devices(self) -> int:
        """The number of devices that it runs on."""
        ...

    def events(self, stop: Callable[[], Reason | None]) -> Iterator[Event]:
        """Run to the end, and yield what happens.

        Args:
          stop: returns why this process is to stop after the step, or None.

        Raises:
          InputError: processes differ, or a checkpoint cannot be read.
          MachineError: a checkpoint cannot be written.
        """
        ...


@runtime_checkable
class Trainer(Protocol):
    """A backend that trains."""

    def train(self, job: TrainJob) -> AbstractContextManager[Training]:
        """Bring a run onto the devices, and make its folder.

        Raises:
          UsageError, InputError: the mesh does not suit the model or the devices.
          MachineError: an extra is missing, or processes do not meet.
        """
        ...


# What is wrong with the routers of a run, as its metrics say: dead experts, saturation.

DEAD_STEPS = 50
"""An expert without a row for so many steps in a row is dead."""

SATURATED_ENTROPY = 0.1
"""A router whose entropy is below this part of the largest one chooses without looking."""

SATURATED_STEPS = 20


@dataclass(frozen=True)
class Alarm:
    """Something that went wrong in a layer, first seen at a step."""

    step: int
    layer: str
    fault: str

    def __str__(self) -> str:
        return f"step {self.step:,}: {self.layer}: {self.fault}"


@dataclass
class Watch:
    """Watches the metrics of a run, and raises each alarm once while it lasts.

    Attributes:
      counts: for how many steps in a row something has been wrong, by layer and what.
    """

    counts: dict[tuple[str, str], int] = field(default_factory=dict)

    def __call__(self, step: int, metrics: Mapping[str, Metric]) -> list[Alarm]:
        """Return the alarms that a step sets off."""
        alarms = []
        for layer, fault, is_wrong, limit in _findings(metrics):
            key = (layer, fault)
            self.counts[key] = self.counts.get(key, 0) + 1 if is_wrong else 0
            if self.counts[key] == limit:
                alarms.append(Alarm(step, layer, fault))
        return alarms


def _findings(metrics: Mapping[str, Metric]) -> list[tuple[str, str, bool, int]]:
    """Return layer, what may be wrong, whether it is, and for how many steps it has to be."""
    findings = []
    for name, value in metrics.items():
        layer, _, kind = name.removeprefix(METRIC).rpartition(".")
        if not name.startswith(METRIC):
            continue
        if kind == "loads" and isinstance(value, list):
            for expert, load in enumerate(value):
                fault = f"expert {expert} got no row for {DEAD_STEPS} steps"
                findings.append((layer, fault, load == 0, DEAD_STEPS))
        loads = metrics.get(f"{METRIC}{layer}.loads")
        if kind == "entropy" and isinstance(value, float) and isinstance(loads, list):
            is_low = value < SATURATED_ENTROPY * log(max(len(loads), 2))
            fault = f"the router is saturated: its entropy is below {SATURATED_ENTROPY:.0%}"
            findings.append((layer, fault, is_low, SATURATED_STEPS))
    return findings


# Metrics of a run for TensorBoard and Weights & Biases, as its events pass by.

MOST_EXPERTS = 16
"""Of more experts the largest and the smallest value are shown."""


class Tracker(Protocol):
    """A receiver of metrics."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log values at a step."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


def tracked(events: Iterable[Event], trackers: Iterable[Tracker], every: int) -> Iterator[Event]:
    """Yield `events`, after `trackers` had what they measure: steps every so many, evaluations."""
    opened = list(trackers)
    try:
        for event in events:
            if not isinstance(event, Stepped) or event.step % every == 0:
                values = scalars(event)
                for tracker in opened if values else ():
                    tracker.log(event.step, values)
            yield event
    finally:
        for tracker in opened:
            tracker.close()


def scalars(event: Event) -> dict[str, float]:
    """Return what an event measures, as numbers by the names that trackers show."""
    match event:
        case Stepped():
            speed = {"train/tokens": float(event.tokens), "train/seconds": event.seconds}
            speed |= {f"train/{name}": value for name, value in event.speed.items()}
            return {**speed, **dict(_named(event.metrics))}
        case Evaluated():
            losses = {f"held_out/{name}": loss for name, loss in event.losses.items()}
            spreads = {f"{METRIC}{layer}.spread": s for layer, s in event.spread.items()}
            return {**losses, **dict(_named(spreads))}
    return {}


def _named(metrics: Mapping[str, Metric]) -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        layer, _, kind = name.removeprefix(METRIC).rpartition(".")
        title = f"{layer}/{kind}" if name.startswith(METRIC) else f"train/{name}"
        if not isinstance(value, list):
            yield title, value
        elif len(value) <= MOST_EXPERTS:
            yield from ((f"{title}/{number}", entry) for number, entry in enumerate(value))
        else:
            yield from ((f"{title}/largest", max(value)), (f"{title}/smallest", min(value)))


class TensorBoard:
    """Event files that TensorBoard reads, in the folder ``tensorboard`` of a run.

    Args:
      run: the folder of the run.
      step: where it goes on; what was logged later is hidden.

    Raises:
      MachineError: tensorboardX is missing.
    """

    def __init__(self, run: Path, step: int) -> None:
        require("TensorBoard", ("tensorboard",))
        from tensorboardX import SummaryWriter
        from tensorboardX.summary import Summary

        self._writer: Any = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self._summary: Any = Summary

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log values at a step."""
        # One event for all values: `add_scalar` passes a queue between processes for each.
        scalars = [self._summary.Value(tag=n, simple_value=v) for n, v in values.items()]
        self._writer.file_writer.add_summary(self._summary(value=scalars), step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, which goes on when this one does.

    Args:
      run: the folder of the run.
      project: where it belongs.
      recipe: shown as its configuration.

    Raises:
      MachineError: wandb is missing.
    """

    def __init__(self, run: Path, project: str, recipe: Json) -> None:
        require("Weights & Biases", ("wandb",))
        import wandb

        folder = run / "wandb"
        folder.mkdir(exist_ok=True)
        path = folder / "id"
        identity = path.read_text("utf-8") if path.is_file() else wandb.util.generate_id()
        path.write_text(identity, "utf-8")
        self._run: Any = wandb.init(
            project=project,
            name=run.name,
            dir=str(run),
            id=identity,
            resume="allow",
            config=dict(recipe),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log values at a step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Write what is left."""
        self._run.finish()
