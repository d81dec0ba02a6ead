"""Write a run folder: made as a whole, then grown by steps that are complete or absent."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

from moecc.errors import InputError, MachineError, describe
from moecc.formats.files import (
    os_errors,
    read_json_object,
    read_whole,
    remove,
    replace_durable,
    synchronise_folder,
    write_durable,
)
from moecc.formats.manifest import MANIFEST_NAME, FileName, FileRecord, file_records, seal
from moecc.formats.modelcard import source_name
from moecc.formats.output import LEFT_BEHIND, lock_folder, output_folder
from moecc.formats.run import (
    GRAPH,
    LINEAGE,
    LINEAGE_SCHEMA,
    METRICS,
    RECIPE,
    SOURCE,
    SPEED,
    STATE,
    STEP,
    STEPS,
    SavedStep,
    StepRecord,
    base_models,
    best_step,
    is_run,
    mirrored_run,
    no_run,
    require_state,
    run_stages,
    saved_steps,
    stages_of,
)
from moecc.formats.store import fetch, is_address
from moecc.formats.writer import has_journal
from moecc.ir.conventions import METRIC
from moecc.model.open import OpenedModel
from moecc.support.lazy import np
from moecc.support.process import Closing
from moecc.support.record import read_record, to_json
from moecc.support.text import brief, facts_table, finite_json
from moecc.support.untyped import Json, JsonDict
from moecc.train.events import (
    Alarm,
    Evaluated,
    Event,
    Reason,
    Saved,
    Skipped,
    Stepped,
    StepWork,
    Stopped,
    Training,
    TrainJob,
    Watch,
)
from moecc.types import Doubles
from moecc.version import __version__

Content = Path | bytes
"""A file, or what is to be in it."""

OTHER_RUN = "give another folder; moecc train --resume RUN goes on with a run"
"""The way out where the folder of a new run is not empty."""

_MAX_PART_BYTES = 64 << 20


def create_run(
    out: Path,
    *,
    recipe: str,
    graph: str,
    lineage: Json,
    source: Mapping[str, Content],
    inputs: tuple[Path, ...] = (),
    begun: tuple[SavedStep, str] | None = None,
) -> None:
    """Make the folder of a run; it is there as a whole, or not at all.

    Args:
      out: the folder; it must not exist, or be empty.
      recipe: the recipe, as TOML.
      graph: the canonical graph, as text.
      lineage: what ``lineage.json`` says.
      source: the files of the source that an export copies, by name.
      inputs: what is read, which the output must not touch.
      begun: a step of another run that this one goes on from, and the digest of the recipe.

    What a training left that was killed here is removed: a job that a scheduler starts again has
    nobody who would give ``--force``.

    Raises:
      InputError: the folder cannot be used.
      MachineError: the disk is full, or there is no right to write.
    """
    with output_folder(out, inputs=inputs, can_resume=_remove_if_run, hint=OTHER_RUN) as folder:
        (folder / SOURCE).mkdir()
        (folder / STEPS).mkdir()
        write_durable(folder / RECIPE, recipe.encode())
        write_durable(folder / GRAPH, graph.encode())
        write_durable(folder / LINEAGE, _json(lineage))
        write_durable(folder / METRICS, b"")
        for name, content in source.items():
            path = folder / SOURCE / name
            path.parent.mkdir(exist_ok=True)
            write_durable(path, read_whole(content) if isinstance(content, Path) else content)
        if begun is not None:
            _copy_step(folder, *begun)


def _remove_if_run(partial: Path) -> bool:
    """Let the beginning of a run be removed. Raises InputError if it is that of a conversion."""
    if has_journal(partial):
        raise InputError(
            LEFT_BEHIND,
            where=partial,
            hint="give the run another folder, or remove it with moecc clean",
        )
    return False


def _copy_step(run: Path, step: SavedStep, recipe: str) -> None:
    """Copy a step of another run; what was measured there is not of this run."""
    require_state(step)  # the copy gets digests of its own
    state = begin_step(run, step.number)
    try:
        shutil.copytree(step.state, state)
    except (shutil.Error, OSError) as error:
        raise MachineError(f"the state cannot be copied: {error}", where=step.state) from None
    facts = {name: getattr(step.facts, name) for name in ("tokens", "left_out", "tensors")}
    finish_step(run, step.number, {**facts, "recipe": recipe, "loss": None})


@contextmanager
def locked_run(run: Path) -> Iterator[None]:
    """Hold the lock of a run, which no other process may train meanwhile.

    Raises:
      InputError: another process trains it.
      MachineError: the folder cannot be opened.
    """
    with os_errors(run, "open"):
        descriptor = os.open(run, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not lock_folder(descriptor):
            raise InputError(
                "another process trains this run", where=run, hint="wait until it has finished"
            )
        yield
    finally:
        os.close(descriptor)


def begin_step(run: Path, number: int) -> Path:
    """Return the folder for the arrays of a step; what an earlier attempt left there is removed."""
    folder = run / STEPS / str(number)
    remove(folder)
    with os_errors(folder, "make"):
        folder.mkdir()
    return folder / STATE


# The files of a step that each of several processes wrote, and hashes itself.


@dataclass(frozen=True)
class StepPart:
    """The files that one of several processes wrote of a step, by paths in its state."""

    files: Mapping[FileName, FileRecord]


def part_name(process: int) -> str:
    """Return the name of the record of a process that is not the first, beside the state."""
    return f"part-{process}.json"


def write_part(run: Path, number: int, process: int) -> None:
    """Write the digests of the files of a step that a process wrote. Raises MachineError."""
    state = run / STEPS / str(number) / STATE
    written = [
        path
        for path in _files_in(state)
        # A database of each process in a shared folder; in a folder of its own, files of chunks.
        if (parts := path.relative_to(state).parts)[0] == f"ocdbt.process_{process}"
        or parts[1:2] == ("c",)
    ]
    part = StepPart(digests(state, written))
    replace_durable(state.parent / part_name(process), _json(to_json(part)))


def read_part(path: Path) -> StepPart:
    """Return the record that `write_part` wrote. Raises InputError if it is none."""
    return read_record(StepPart, read_json_object(path, limit_bytes=_MAX_PART_BYTES), str(path))


def _take_parts(folder: Path) -> dict[str, FileRecord]:
    """Return the digests of what other processes wrote of a step, and remove their records."""
    records: dict[str, FileRecord] = {}
    for path in sorted(folder.glob("part-*.json")):
        records |= read_part(path).files
        path.unlink()
    return records


def finish_step(run: Path, number: int, facts: Json) -> SavedStep:
    """Make a step complete, whose arrays are written; from now on it is one of the run's.

    Args:
      run: the folder.
      number: steps done.
      facts: what ``step.json`` says besides schema, number, and the digests of the state.

    Raises:
      MachineError: the disk is full, or the arrays are gone.
    """
    folder = run / STEPS / str(number)
    if not (folder / STATE).is_dir():
        raise MachineError("the arrays of a checkpoint were removed", where=folder)
    described = [run / name for name in (RECIPE, LINEAGE, GRAPH)]
    state, parts = folder / STATE, _take_parts(folder)
    remaining = [p for p in _files_in(state) if p.relative_to(state).as_posix() not in parts]
    content = StepRecord(
        step=number,
        **facts,
        files=dict(sorted({**parts, **digests(state, remaining)}.items())),
        run_files=digests(run, [*described, *_files_in(run / SOURCE)]),
    )
    _write_record(folder, content)
    synchronise_folder(folder.parent)
    return SavedStep(number, folder)


def record_loss(step: SavedStep, loss: float | None) -> None:
    """Record the evaluation of a step that was saved before it was evaluated.

    Raises:
      MachineError: the disk is full, or cannot be written.
    """
    _write_record(step.folder, replace(step.facts, loss=loss, is_unevaluated=False))


def _write_record(folder: Path, record: StepRecord) -> None:
    replace_durable(folder / STEP, seal(_json(to_json(record)).removesuffix(b"\n}\n")))


def keep_steps(run: Path, count: int) -> None:
    """Remove the steps of a run but the last `count` and the best."""
    steps = saved_steps(run)
    newest = {s.number for s in steps[-max(count, 1) :]}
    best = best_step(steps)
    for step in steps:
        if step.number not in newest and step != best:
            # A folder without its step.json is no step, whatever else is still in it.
            (step.folder / STEP).unlink(missing_ok=True)
            remove(step.folder)


def remove_incomplete(run: Path) -> None:
    """Remove what a killed save left, and steps that are being removed."""
    complete = {s.folder for s in saved_steps(run)}
    (run / STEPS).mkdir(exist_ok=True)  # copies of a run without checkpoints may lack it
    for folder in (run / STEPS).iterdir():
        if folder not in complete:
            remove(folder)


def digests(folder: Path, files: Iterable[Path]) -> dict[str, FileRecord]:
    """Return size and digest of `files` by their paths in `folder`."""
    return file_records({path.relative_to(folder).as_posix(): path for path in files})


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _json(content: Json) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


# The journal of a run: a line of JSON an event, the same bytes however often it was resumed.
#
# It holds what a recipe decides and no times, so that a run that was killed and resumed has the
# journal of one that was not.  A resumed run cuts it back to its checkpoint first.


def event_line(event: Event) -> JsonDict | None:
    """Return what the journal says of an event; None where that does not belong into it."""
    match event:
        case Stepped():
            return {"step": event.step, "tokens": event.tokens, **event.metrics}
        case Skipped():
            if event.back_to is not None:
                # Later than the checkpoint: a run that resumes from it comes by here again.
                return {"step": event.back_to + 1, "left_out": list(event.left_out)}
            faults = [fault.as_dict() for fault in event.faults]
            return {"step": event.step, "skipped": event.batch, "faults": faults, **event.metrics}
        case Evaluated():
            spread = {"spread": dict(event.spread)} if event.spread else {}
            return {"step": event.step, "held_out": dict(event.losses), **spread}
    return None


class Journal(Closing):
    """Appends lines to a file, each in one write; events, or lines of another kind.

    Args:
      path: the file; it is made if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with os_errors(path, "write"):
            self._file = path.open("ab", buffering=0)

    def write(self, line: Json) -> None:
        """Append a line. Raises MachineError if the disk is full."""
        text = json.dumps(
            finite_json(line), ensure_ascii=False, separators=(",", ":"), allow_nan=False
        )
        with os_errors(self.path, "write"):
            self._file.write(text.encode() + b"\n")

    def record(self, event: Event) -> None:
        """Append what the journal says of an event, if anything. Raises as `write`."""
        line = event_line(event)
        if isinstance(event, Skipped) and event.back_to is not None:
            cut_back(self.path, event.back_to)
        if line is not None:
            self.write(line)

    def synchronise(self) -> None:
        """Return once the lines are on the disk. Raises MachineError."""
        with os_errors(self.path, "synchronise"):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def cut_back(path: Path, step: int, is_unevaluated: bool = False) -> None:
    """Remove the lines of a journal that are later than `step`, and what is no whole line.

    Where the checkpoint is unevaluated, an evaluation of `step` is later.

    Raises:
      InputError: what is no line stands before one that stays, which no kill leaves.
      MachineError: the file cannot be written.
    """
    if not path.exists():
        return
    with os_errors(path, "write"), path.open("r+b") as file:
        length, damaged = 0, 0
        for number, raw in enumerate(file, 1):
            line_step = _step_of(raw)
            if line_step is None:
                damaged = damaged or number
            elif line_step > step - (is_unevaluated and b'"held_out":' in raw):
                break
            elif damaged:
                raise InputError(
                    "not a line of a journal, before lines that are", where=f"{path}:{damaged}",
                    hint="mend the line, or remove it",
                )  # fmt: skip
            else:
                length += len(raw)
        file.truncate(length)


def _step_of(raw: bytes) -> int | None:
    """Return the step of a line of a journal; None for what is no whole line."""
    try:
        step = json.loads(raw)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if raw.endswith(b"\n") and isinstance(step, int) else None


def read_journal(path: Path) -> Iterator[JsonDict]:
    """Yield the lines of a journal; one that a kill cut off at the end is left out.

    Raises:
      InputError: a line is not a JSON object.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                return
            try:
                line = json.loads(raw)
            except (ValueError, RecursionError):
                line = None
            if not isinstance(line, dict):
                raise InputError(
                    "not a line of JSON", where=f"{path}:{number}", expected="an object in braces"
                )
            yield line


# The journal of a run as series over its steps, for reports.

MOST_POINTS = 1000
"""Longer series are means of so many parts."""

_BY_NAME = ("held_out", "spread")
"""The keys of a line whose values have names of their own."""

_UNSERIAL = ("left_out", "faults")
"""The keys of a line that no series is made of."""


CURVES = {
    "loss": "Loss of each step",
    "loss.cross_entropy": "Cross entropy of each step, nats a token",
    "gradient_norm": "Norm of the gradients",
    "rate": "Learning rate",
}
ROUTER_CURVES = {
    "entropy": "Entropy of the router, nats",
    "dropped": "Share of choices without a slot",
    "max_violation": "Largest load over the mean, less 1",
    "logit_square": "Mean square of the router's logits",
}


@dataclass(frozen=True)
class Series:
    """Values over steps.

    Attributes:
      steps: ``f64[point]``.
      values: ``f64[point]``, or ``f64[point, expert]``.
    """

    steps: Doubles
    values: Doubles

    def thinned(self) -> Series:
        """Return the series with at most `MOST_POINTS` points, each the mean of a part."""
        if len(self.steps) <= MOST_POINTS:
            return self
        parts = np.array_split(np.arange(len(self.steps)), MOST_POINTS)
        steps = np.array([self.steps[part].mean() for part in parts])
        return Series(steps, np.stack([self.values[part].mean(axis=0) for part in parts]))


@dataclass(frozen=True)
class RunSeries:
    """The measurements of a run.

    Attributes:
      name: of its folder.
      lines: of its journal.
      facts: for people: steps, tokens, recipe and the like.
    """

    name: str
    lines: tuple[JsonDict, ...]
    facts: dict[str, str]

    def __repr__(self) -> str:
        return brief("moecc.Run", [("", self.name), *self.facts.items()])

    def _repr_html_(self) -> str:
        alarms = (("alarm", str(alarm)) for alarm in self.alarms())
        return facts_table([("run", self.name), *self.facts.items(), *alarms])

    @cached_property
    def stepped(self) -> list[JsonDict]:
        """The lines of steps whose update was made."""
        return [line for line in self.lines if "loss" in line and "skipped" not in line]

    def scalar(self, name: str) -> Series | None:
        """Return a number over the steps, or None where it was not measured."""
        points = [(line["step"], line[name]) for line in self.stepped if name in line]
        return _series(points)

    @property
    def held_out(self) -> dict[str, Series]:
        """The held-out losses by the name of the text."""
        lines = [line for line in self.lines if "held_out" in line]
        names = dict.fromkeys(name for line in lines for name in line["held_out"])
        pairs = {
            name: [
                (line["step"], series[name])
                for line in lines
                if name in (series := line["held_out"])
            ]
            for name in names
        }
        return {name: s for name, series in pairs.items() if (s := _series(series)) is not None}

    @cached_property
    def layers(self) -> list[str]:
        """The routed layers, in the order of the model."""
        names = {
            name.removeprefix(METRIC).rpartition(".")[0]
            for line in self.stepped[:1]
            for name in line
            if name.startswith(METRIC)
        }
        return sorted(names, key=lambda name: list(map(_place, name.split("."))))

    def of_layer(self, layer: str, kind: str) -> Series | None:
        """Return what was measured of a layer: ``loads``, ``entropy``, ``dropped``."""
        return self.scalar(f"{METRIC}{layer}.{kind}")

    def spread(self, layer: str) -> Series | None:
        """Return how far the experts of a layer were apart, at each evaluation."""
        lines = (line for line in self.lines if layer in line.get("spread", {}))
        return _series([(line["step"], line["spread"][layer]) for line in lines])

    def alarms(self) -> Iterator[Alarm]:
        """Yield what went wrong in routers."""
        watch = Watch()
        for line in self.stepped:
            yield from watch(line["step"], line)


def _series(points: Sequence[tuple[int, Any]]) -> Series | None:
    if not points:
        return None
    steps, values = zip(*points, strict=True)
    return Series(np.array(steps, np.float64), np.array(values, np.float64)).thinned()


def _place(part: str) -> tuple[int, str]:
    """Return the place of a part of a layer's name among others: numbers first, by their value."""
    is_index = part.isascii() and part.isdecimal() and len(part) < 10
    return (int(part), "") if is_index else (sys.maxsize, part)


_LARGEST = 1 << 63


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_number(value: object) -> bool:
    """Return whether a JSON value is a number that a float can hold."""
    if type(value) is int:
        return abs(value) < _LARGEST
    return isinstance(value, float) and isfinite(value)


def _check_lines(lines: Sequence[JsonDict], path: Path) -> None:
    """Check the values of a journal. Raises InputError with the first line that is wrong."""
    lengths: dict[str, int | None] = {}
    for number, line in enumerate(lines, 1):
        for key, expected in _line_faults(line, lengths):
            raise InputError(
                "not a line of a journal",
                where=f"{path}:{number}: {key}",
                expected=expected,
                found=describe(line.get(key)),
            )


def _is_scalar(key: str) -> bool:
    """Return whether the values of a key are single numbers."""
    of_router = key.startswith(METRIC) and key.rpartition(".")[2] in ROUTER_CURVES
    return of_router or key == "held_out" or key in CURVES


def _line_faults(line: JsonDict, lengths: dict[str, int | None]) -> Iterator[tuple[str, str]]:
    """Yield the keys of a line whose values are wrong, and what they should be.

    Args:
      line: the line.
      lengths: of the lists of earlier lines by key, None for numbers; keys of this one are added.
    """
    for key in ("step", "tokens"):
        if (key == "step" or key in line) and not _is_count(line.get(key)):
            yield key, "an integer, 0 or more"
    for key, value in line.items():
        if key in _UNSERIAL:
            continue
        values = value if key in _BY_NAME else {"": value}
        if not isinstance(values, dict):
            yield key, "an object"
            continue
        for name, entry in values.items():
            entries = entry if isinstance(entry, list) else [entry]
            length = len(entry) if isinstance(entry, list) else None
            is_listed = key == "spread" or key.endswith(".loads")
            if not entries or not all(e is None or _is_number(e) for e in entries):
                yield key, "numbers, or lists of numbers"
            elif _is_scalar(key) and length is not None:
                yield key, "a number"
            elif is_listed and length is None:
                yield key, "lists of numbers"
            elif lengths.setdefault(f"{key} {name}", length) != length:
                yield key, "as many numbers as in earlier lines"


def _pace(path: Path) -> str:
    """Return the median time of the steps of a run that compiled nothing, beside its plan's."""
    file = path / SPEED
    steps = [line for line in read_journal(file) if "seconds" in line and "compiles" not in line]
    if not steps:
        return "not measured"
    names = ("seconds", "planned_seconds", "mfu")
    values = {n: [line[n] for line in steps if n in line] for n in names}
    if not all(_is_number(value) for row in values.values() for value in row):
        raise InputError("not a line of a journal", where=file, expected=f"numbers as {names}")
    seconds, planned, mfu = (median(values[n]) if values[n] else None for n in names)
    text = f"{seconds:.3g}"
    text += "" if planned is None else f", planned {planned:.3g}"
    return text if mfu is None else f"{text}, {mfu:.1%} of the peak"


def read_run(path: str | Path) -> RunSeries:
    """Return what a run measured, local or in a store.

    Raises:
      InputError: it is no run, has measured nothing, or its journal is damaged.
    """
    if is_address(str(path)):
        path = mirrored_run(str(path))
        for name in (METRICS, SPEED):
            fetch(path / name)
    if not is_run(path):
        raise no_run(path)
    path = Path(path)
    lines = tuple(read_journal(path / METRICS))
    _check_lines(lines, path / METRICS)
    if not any("loss" in line for line in lines):
        raise InputError("the run has made no step", where=path)
    stage = run_stages(path)[-1]
    steps = saved_steps(path)
    best = best_step(steps)
    last = max(line["step"] for line in lines)
    tokens = max(line.get("tokens", 0) for line in lines)
    facts = {
        "source": str(stage.get("source", "")),
        "pipeline": str(stage.get("pipeline", "")) or "none",
        "steps": f"{last:,}",
        "tokens": f"{tokens:,}",
        "best held out": "none" if best is None else f"{best.loss:.4f} at step {best.number:,}",
        "recipe": str(stage.get("recipe", ""))[:19],
        "seconds a step": _pace(path),
    }
    return RunSeries(path.resolve().name, lines, facts)


# Where a run is in its data: steps done, and the batches that are left out.


@dataclass(frozen=True)
class Position:
    """The position of a run in its data.

    Attributes:
      step: steps done.
      tokens: trained on, padding left out.
      left_out: numbers of batches that the guard left out for good, rising.
    """

    step: int = 0
    tokens: int = 0
    left_out: tuple[int, ...] = ()

    @property
    def batch(self) -> int:
        """The number of the next batch: the steps take the batches in order, but for some."""
        return batch_of(self.step, self.left_out)

    def after(self, tokens: int) -> Position:
        """Return the position after one more step on `tokens`."""
        return replace(self, step=self.step + 1, tokens=self.tokens + tokens)

    def without(self, batches: tuple[int, ...]) -> Position:
        """Return this position with `batches` left out as well."""
        return replace(self, left_out=tuple(sorted({*self.left_out, *batches})))


def batch_of(step: int, left_out: tuple[int, ...]) -> int:
    """Return the number of the batch of a step: the step-th number that is not left out."""
    number = step
    for gone in left_out:
        if gone <= number:
            number += 1
    return number


# What a run keeps of its source: its files, and how it came about.


def lineage(model: OpenedModel, stage: Json) -> JsonDict:
    """Return what ``lineage.json`` says of a run that begins from `model`.

    Args:
      model: the source.
      stage: what the run itself adds: pipeline, recipe, data.
    """
    checkpoint = model.checkpoint
    header: JsonDict = {"schema": LINEAGE_SCHEMA, "moecc": __version__}
    if checkpoint is None:
        return {**header, "card": {}, "stages": [{"source": model.name, **stage}]}
    records = file_records(checkpoint.files())
    source = {
        "source": source_name(checkpoint.path),
        "base_model": list(base_models(checkpoint)),
        "source_files": {n: r.sha256 for n, r in sorted(records.items())},
    }
    stages = [*stages_of(checkpoint), {**source, **stage}]
    return {**header, "card": checkpoint.card(), "stages": stages}


def source_files(model: OpenedModel, config: bytes) -> dict[str, Path | bytes]:
    """Return the files of a source that a run keeps: config, companions, and its manifest."""
    files: dict[str, Path | bytes] = {"config.json": config}
    if model.checkpoint is None:
        return files
    files |= model.checkpoint.companions()
    folder = model.checkpoint.path
    places = (folder / MANIFEST_NAME, folder / SOURCE / MANIFEST_NAME)
    manifest = next((path for path in places if path.is_file()), None)
    return files if manifest is None else {**files, MANIFEST_NAME: manifest}


# Write the journals of a run while its events pass by.


def followed(
    job: TrainJob, training: Training, stop: Callable[[], Reason | None], work: StepWork
) -> Iterator[Event]:
    """Yield the events of a training, each after it is in the journals of its run.

    Args:
      job: what is trained.
      training: on its devices.
      stop: returns why to stop after the step, or None.
      work: of a step.

    Raises:
      As `moecc.train.events.Training.events`.
    """
    every = job.recipe.run.log_steps
    with ExitStack() as opened:
        journals: list[Journal] = []
        if training.writes:
            last = steps[-1] if (steps := saved_steps(job.run)) else None
            begin = (last.number, last.facts.is_unevaluated) if last else (0, False)
            for name in (METRICS, SPEED):
                cut_back(job.run / name, *begin)
                journals.append(opened.enter_context(Journal(job.run / name)))
        for event in training.events(stop):
            if isinstance(event, Stepped):
                event = replace(event, speed={**event.speed, **work.figures(event.seconds)})
            if journals and not (isinstance(event, Stepped) and event.step % every):
                _record(event, *journals)
            yield event


def _record(event: Event, metrics: Journal, speed: Journal) -> None:
    """Write an event to two files, since only the first is repeatable."""
    metrics.record(event)
    match event:
        case Stepped():
            line = {
                "step": event.step,
                "seconds": round(event.seconds, 6),
                "processor_seconds": round(event.processor_seconds, 6),
                **{name: float(f"{value:.6g}") for name, value in event.speed.items()},
            }
            speed.write({**line, "compiles": True} if event.compiles else line)
        case Saved():
            metrics.synchronise()
            line = {"step": event.step, "saved_seconds": round(event.seconds, 3)}
            speed.write({**line, "at": round(time.time(), 3)})
        case Stopped():
            metrics.synchronise()
