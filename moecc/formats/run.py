"""Run folders of ``moecc train`` as checkpoints: their layout, and the state that they hold."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated

from moecc.errors import (
    CheckError,
    InputError,
    MoeccError,
    Problem,
    Problems,
    nearest,
    quoted,
    raise_problems,
)
from moecc.formats.files import (
    Identity,
    files_below,
    identify,
    link_fault,
    read_json_object,
)
from moecc.formats.folder import CONFIG_NAME, MAX_CONFIG_BYTES, find_companions
from moecc.formats.gguf.storage import FILE_NAME
from moecc.formats.manifest import (
    FileName,
    FileRecord,
    file_records,
    load,
    read_sealed,
)
from moecc.formats.modelcard import CardEntries, hub_repository
from moecc.formats.open import missing_place
from moecc.formats.source import (
    Checkpoint,
    DerivedCheckpoint,
    GivenParams,
    TensorInfo,
    tensor_info,
)
from moecc.formats.store import HUB, fetch, is_address, mirror
from moecc.support.record import Check, Count, RecordReader, read_record
from moecc.support.text import amount
from moecc.support.untyped import Json
from moecc.types import DTYPES, Array

if TYPE_CHECKING:
    from moecc.formats.arrays import ZarrArrays

# The layout of a run folder, and the steps that it holds.
#
# ::
#
#     recipe.toml      everything that decides the run, defaults included
#     lineage.json     source, pipeline, recipe and data, with their digests
#     graph.moe        the model; its parameters are tensors of the state, by their own names
#     source/          config, tokenizer and licences of the source, and its manifest
#     metrics.jsonl    what was measured, a line an event
#     steps/N/state/   parameters, moments and counters after N steps, as Orbax writes them
#     steps/N/step.json    written last: a step without it is not complete

RECIPE, LINEAGE, GRAPH, SOURCE = "recipe.toml", "lineage.json", "graph.moe", "source"
METRICS, SPEED, STEPS = "metrics.jsonl", "speed.jsonl", "steps"
STATE, STEP = "state", "step.json"

STEP_SCHEMA = "moecc.step/1"
LINEAGE_SCHEMA = "moecc.lineage/1"
PARAMS = "params"
"""The part of a state that holds the parameters."""

BEST, LAST = "best", "last"
Stage = Json
"""A stage of a lineage: a conversion or a training."""

_MAX_JSON_BYTES = 64 << 20
_HINT = "restore the file, or use another checkpoint of the run"


@dataclass(frozen=True)
class StoredArray:
    """The element type and shape of a parameter in a saved state."""

    dtype: Annotated[str, Check(DTYPES.__contains__, "an element type of moecc")]
    shape: tuple[Count, ...]


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """The content of ``step.json``.

    Attributes:
      schema: the version of this layout.
      step: steps done.
      recipe: the digest of the recipe.
      tokens: tokens seen.
      left_out: the documents that were left out.
      loss: the held-out loss at this step, if it was evaluated then.
      is_unevaluated: whether the run was told to stop before an evaluation that was due.
      tensors: the parameters, by name.
      files: the digests of the state, by paths in its folder.
      run_files: the digests of the run's own files, by paths in its folder.
    """

    schema: str = STEP_SCHEMA
    step: Count
    recipe: str = ""
    tokens: Count
    left_out: tuple[Count, ...]
    loss: float | None = None
    is_unevaluated: bool = False
    tensors: Mapping[str, StoredArray]
    files: Mapping[FileName, FileRecord]
    run_files: Mapping[FileName, FileRecord]


@dataclass(frozen=True)
class Lineage:
    """The content of ``lineage.json``: what is kept of the source's card, and the stages."""

    schema: str = LINEAGE_SCHEMA
    moecc: str = ""
    card: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    stages: tuple[Json, ...] = ()


@dataclass(frozen=True)
class _StageFields:
    """The fields of a stage that are relied on."""

    kind: str = ""
    source: str = ""
    pipeline: str = ""
    preserves: str = ""
    start: str = ""
    recipe: str = ""
    recipe_toml: str = ""
    from_step: Count = 0
    steps: Count = 0
    tokens: Count = 0
    data: Json = field(default_factory=dict)


@dataclass(frozen=True)
class SavedStep:
    """A complete checkpoint of a run.

    Attributes:
      number: steps done.
      folder: ``steps/N``.
    """

    number: int
    folder: Path

    @property
    def state(self) -> Path:
        """The folder of the arrays."""
        return self.folder / STATE

    @cached_property
    def facts(self) -> StepRecord:
        """The content of ``step.json``.

        Raises:
          InputError: it was changed after it was written, is of another version, or a value has
            another form.
        """
        path = self.folder / STEP
        document = read_sealed(path, _MAX_JSON_BYTES, InputError, _HINT)
        record = read_record(StepRecord, document, str(path))
        if record.step != self.number:
            raise InputError(
                "the step is of another version of moecc, or was moved",
                where=path,
                expected=f'"step": {self.number}',
                found=f'"step": {record.step}',
            )
        return record

    @property
    def loss(self) -> float | None:
        """The held-out loss at this step, if it was evaluated then."""
        return self.facts.loss


def is_run(path: str | os.PathLike[str]) -> bool:
    """Return whether a folder is the run of a training."""
    folder = Path(path)
    return os.path.isfile(folder / GRAPH) and os.path.isfile(folder / LINEAGE)


def split_reference(text: str) -> tuple[str, str] | None:
    """Return folder and step of ``RUN``, ``RUN@best`` or ``RUN@1200``; None if it is no run.

    The folder of a run in an object store is its local mirror. Raises as `mirror`.
    """
    if is_address(text):
        match = re.fullmatch(r"(.+)@(best|last|\d+)", text)
        address, step = match.groups() if match else (text, LAST)
        if text.startswith(HUB) or text.endswith(".gguf"):
            return None
        folder = str(mirrored_run(address))
        return (folder, step) if is_run(folder) else None
    if is_run(text):
        return text, LAST
    folder, at, step = text.rpartition("@")
    return (folder, step) if at and is_run(folder) else None


def no_run(place: str | Path) -> InputError:
    """Return the error for a place that holds no run."""
    if not is_address(str(place)) and not os.path.exists(place):
        return missing_place(Path(place))
    return InputError("this is not the folder of a run", where=place)


def mirrored_run(address: str) -> Path:
    """Return the local mirror of what may be a run in a store. Raises as `mirror`."""
    run = mirror(address, (SOURCE, STEPS))
    fetch(run / GRAPH)  # what reads these opens them itself
    fetch(run / SOURCE)
    return run


def saved_steps(run: Path) -> list[SavedStep]:
    """Return the complete checkpoints of a run, the last one last."""
    steps = run / STEPS
    if not steps.is_dir():
        return []
    names = [name for name in os.listdir(steps) if name.isdecimal() and str(int(name)) == name]
    numbered = [SavedStep(int(name), steps / name) for name in names]
    return sorted((s for s in numbered if (s.folder / STEP).is_file()), key=lambda s: s.number)


def best_step(steps: list[SavedStep]) -> SavedStep | None:
    """Return the step with the lowest held-out loss; None where none was evaluated."""
    measured = [(loss, s.number, s) for s in steps if (loss := s.loss) is not None]
    return min(measured)[2] if measured else None


def choose_step(run: Path, which: str) -> SavedStep:
    """Return a checkpoint of a run.

    Args:
      run: the folder.
      which: ``last``, ``best``, or the number of a step.

    Raises:
      InputError: there is no such checkpoint.
    """
    steps = saved_steps(run)
    numbers = ", ".join(str(s.number) for s in steps) or "none"
    if not steps:
        raise InputError(
            "the run has no checkpoint yet", where=run, hint="moecc train --resume goes on"
        )
    if which == LAST:
        return steps[-1]
    if which == BEST:
        if (best := best_step(steps)) is None:
            raise InputError(
                "no checkpoint of the run was evaluated",
                where=f"{run}@{BEST}",
                hint=f"its steps: {numbers}",
            )
        return best
    chosen = next((s for s in steps if str(s.number) == which), None)
    if chosen is None:
        names = [BEST, LAST, *(str(s.number) for s in steps)]
        raise InputError(
            "the run has no such checkpoint",
            where=f"{run}@{which}",
            expected=f"best, last, or one of the steps {numbers}",
            hint="one is saved every run.save_steps steps of the recipe, and the last run.keep stay"
            if which.isdecimal() and int(which) < steps[-1].number
            else nearest(which, names),
        )
    return chosen


def read_lineage(run: Path) -> Lineage:
    """Return the content of ``lineage.json``.

    Raises:
      InputError: it is missing, or of another version, or a value has another form.
    """
    path = run / LINEAGE
    document = read_json_object(path, limit_bytes=_MAX_JSON_BYTES)
    lineage = read_record(Lineage, document, str(path))
    reader = RecordReader(lambda keys: str(path))
    for number, stage in enumerate(lineage.stages):
        reader.section(_StageFields, stage, ("stages", number), is_open=True)
    reader.raise_if_any()
    return lineage


def run_stages(run: Path) -> tuple[Stage, ...]:
    """Return the stages that led to a run, its own last. Raises InputError; see `read_lineage`."""
    stages = read_lineage(run).stages
    if not stages:
        raise InputError("the lineage of the run has no stages", where=f"{run / LINEAGE}: stages")
    return stages


def check_inside(run: Path, step: SavedStep) -> None:
    """Check that no link leads out of a run, among the files of a step and of its source.

    Raises:
      InputError: links that do; all of them.
    """
    raise_problems(fault for path in _links(run, step) if (fault := link_fault(path, run)))


def _links(run: Path, step: SavedStep) -> Iterator[Path]:
    """Yield the symbolic links of a step and of its run."""
    paths = [run / name for name in (RECIPE, LINEAGE, GRAPH, METRICS, STEPS, SOURCE)]
    yield from (path for path in (*paths, step.folder) if path.is_symlink())
    for top in (run / SOURCE, step.folder):
        for folder, folders, files in os.walk(top):
            entries = (Path(folder, name) for name in (*folders, *files))
            yield from (path for path in entries if path.is_symlink())


# Whether the files of a saved step have the digests in its step.json.

_records: dict[tuple[Path, Identity], FileRecord] = {}
"""The files that this process has hashed while it checked steps."""
_hashing = threading.Lock()


def check_step(run: Path, step: SavedStep) -> None:
    """Compare the files of a step, and those of its run, with their digests.

    Raises:
      CheckError: a file is missing or differs, step.json too; all problems.
      InputError: a link leads out of the run, or step.json is not what moecc writes.
      MachineError: a file cannot be read.
    """
    check_inside(run, step)
    read_sealed(step.folder / STEP, _MAX_JSON_BYTES, CheckError, _HINT)
    facts, problems = step.facts, Problems()
    try:
        problems.extend(_differences(step.state, facts.files))
        problems.extend(_differences(run, facts.run_files))
    except InputError as error:
        raise CheckError(error.problems) from None
    problems.raise_if_any(CheckError)


def require_run_files(step: SavedStep) -> None:
    """Require graph, recipe, lineage and source of a step's run to be as they were saved.

    Raises:
      InputError: a file is missing or differs; all of them.
      MachineError: a file cannot be read.
    """
    _require(step, step.folder.parent.parent, "run_files")


def require_state(step: SavedStep) -> None:
    """Require the arrays of a step to be as they were saved; a process hashes each file once.

    Those of a store are brought to this machine. Raises: as `require_run_files`.
    """
    fetch(step.state)
    _require(step, step.state, "files")


def _require(step: SavedStep, folder: Path, digests: str) -> None:
    try:
        problems = _differences(folder, getattr(step.facts, digests))
    except InputError as error:
        problems = list(error.problems)
    if problems and not (step.folder / STEP).is_file():
        problems = [step_removed(step.folder)]
    raise_problems(problems)


def step_removed(folder: Path) -> Problem:
    """Return the problem of a step that training removed while it was read."""
    return Problem(
        "the checkpoint was removed while it was read",
        str(folder),
        hint="a run keeps its last run.keep checkpoints; try once more, or RUN@best",
    )


def _differences(folder: Path, expected: Mapping[str, FileRecord]) -> list[Problem]:
    present = {name: folder / name for name in expected if (folder / name).is_file()}
    problems = [
        Problem(f"the file {quoted(name)} is missing", str(folder), hint=_HINT)
        for name in expected
        if name not in present
    ]
    with _hashing:
        keys = {name: (path.absolute(), identify(path)) for name, path in present.items()}
        unhashed = {name: present[name] for name, key in keys.items() if key not in _records}
        _records.update((keys[n], record) for n, record in file_records(unhashed).items())
        records = {name: _records[key] for name, key in keys.items()}
    for name, record in records.items():
        if record != expected[name]:
            fault = "the file differs from the one that moecc wrote"
            digests = (expected[name].sha256, record.sha256)
            problems.append(Problem(fault, str(folder / name), *digests, hint=_HINT))
    return problems


# The arrays of a saved state: zarr in one database, or each in a folder, as Orbax writes them.

_DATABASE = "manifest.ocdbt"


def array_key(*parts: str) -> str:
    """Return the name of an array in a saved tree, as Orbax joins its keys."""
    return ".".join(parts)


def state_reader(folder: Path) -> ZarrArrays:
    """Return the reader of a saved state, ``steps/N/state``.

    Raises:
      MachineError: tensorstore is missing.
    """
    from moecc.formats.arrays import ZarrArrays

    # Processes that share no folder write files of chunks, which need no merge into a database.
    is_database = (folder / _DATABASE).is_file()
    return ZarrArrays(folder, is_database=is_database, removed=step_removed(folder))


# A step of a run as a checkpoint: the parameters of its state, and the files of its source.


class RunCheckpoint(Checkpoint):
    """The parameters of a step of a run; see `moecc.formats.source.Checkpoint`.

    Attributes:
      run: the run folder.
      step: the step that is read.
      lineage: how the model came about.
    """

    format = "run"

    def __init__(self, run: Path, step: SavedStep) -> None:
        self.run = run
        self.step = step
        self.path = run
        check_inside(run, step)
        require_run_files(step)
        self.lineage = read_lineage(run)
        self.config = read_json_object(run / SOURCE / CONFIG_NAME, limit_bytes=MAX_CONFIG_BYTES)
        self.tensors = MappingProxyType(_tensors(step))
        problems = Problems()
        self._companions = find_companions(run / SOURCE, problems)
        problems.raise_if_any()
        files = [*files_below(step.state), *self.files(), *self._companions.values()]
        self._identities = {path: identify(path) for path in files}

    @cached_property
    def state(self) -> ZarrArrays:
        """The reader of parameters and moments; their files are compared with step.json first.

        Raises:
          InputError: a file is missing or differs; all of them.
          MachineError: tensorstore is missing.
        """
        require_state(self.step)
        return state_reader(self.step.state)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows [start, stop) of the first axis of a parameter; thread-safe.

        Raises:
          InputError: there is no such parameter, or it is not as it was saved.
          MachineError: tensorstore is missing.
        """
        tensor_info(self.tensors, name, self.step.folder)
        return self.state.read(array_key(PARAMS, name), start, stop)

    def remarks(self) -> list[str]:
        """Return how far the model was trained."""
        steps = amount(self.step.number, "step")
        return [f"trained for {steps}, {self.step.facts.tokens:,} tokens"]

    def card(self) -> CardEntries:
        """Return what is kept of the source's card."""
        return dict(self.lineage.card)

    def places(self) -> list[Path]:
        """Return what of the run an output must not touch: all but room for exports."""
        return [self.run / STEPS, self.run / SOURCE]

    def files(self) -> list[Path]:
        """Return graph, recipe, lineage, config and step.json, which has digests of the state."""
        named = [self.run / name for name in (GRAPH, RECIPE, LINEAGE)]
        return [self.step.folder / STEP, *named, self.run / SOURCE / CONFIG_NAME]


def open_run(reference: str) -> RunCheckpoint:
    """Open ``RUN``, ``RUN@best`` or ``RUN@1200``.

    Raises:
      InputError: it is no run, or has no such checkpoint.
    """
    parts = split_reference(reference)
    if parts is None:
        raise no_run(reference)
    run = Path(parts[0])
    return RunCheckpoint(run, choose_step(run, parts[1]))


def _tensors(step: SavedStep) -> dict[str, TensorInfo]:
    tensors = {}
    for name, array in step.facts.tensors.items():
        dtype = DTYPES[array.dtype]
        nbytes = prod(array.shape) * dtype.itemsize_bytes
        tensors[name] = TensorInfo(name, dtype, array.shape, nbytes, step.state, 0)
    return tensors


# The stages from a first source to a checkpoint: conversions and trainings, and their story.

CONVERTED, TRAINED = "convert", "train"
"""The kinds of stages."""

_DIGITS = 19
"""So much of a digest is shown: ``sha256:`` and twelve digits."""

_NOTES = 3
"""So many notes of a conversion are told."""


def stages_of(checkpoint: Checkpoint) -> list[Stage]:
    """Return the stages that led to a checkpoint, as far as it tells: a run, or a conversion.

    Those of models beside it follow, with the name of the model as ``branch``.
    """
    if isinstance(checkpoint, RunCheckpoint):
        *earlier, last = run_stages(checkpoint.run)
        step = checkpoint.step
        return [*earlier, {**last, "steps": step.number, "tokens": step.facts.tokens}]
    if isinstance(checkpoint, GivenParams):
        stage = {"kind": TRAINED, "source": checkpoint.path.name, "outside": True}
        return [*stages_of(checkpoint.base), stage]
    if isinstance(checkpoint, DerivedCheckpoint) and checkpoint.path == checkpoint.base.path:
        branches = checkpoint.branches.items()
        beside = [{**stage, "branch": name} for name, b in branches for stage in stages_of(b)]
        return [*stages_of(checkpoint.base), *beside]
    return _converted(checkpoint.path)


def _converted(path: Path) -> list[Stage]:
    """Return the stages of a conversion, of its manifest; none where there is no sound one."""
    try:
        manifest = load(path.parent if path.name == FILE_NAME else path)
    except MoeccError:
        return []  # a conversion does not rely on it
    stage = {
        "kind": CONVERTED,
        "source": manifest.source,
        "base_model": list(manifest.base_model),
        "pipeline": manifest.pipeline,
        "preserves": manifest.preserves,
        "seed": manifest.seed,
        "notes": list(manifest.notes),
    }
    return [*manifest.lineage, stage]


def base_models(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the models on the Hub that a checkpoint and those beside it are made from.

    A model that was fetched from the Hub is such a model itself; of a conversion or a training they
    are those that it began with, as far as they are known.
    """
    names: list[object] = []
    for each in (checkpoint, *checkpoint.branches.values()):
        stages = [stage for stage in stages_of(each) if "branch" not in stage]
        stated = stages[0].get("base_model") if stages else None
        repository = hub_repository(each.path)
        names += [repository] if repository else stated if isinstance(stated, list) else []
    return tuple(dict.fromkeys(name for name in names if isinstance(name, str)))


def is_trained(stages: Sequence[Stage]) -> bool:
    """Return whether a training is among `stages`."""
    return any(stage.get("kind") == TRAINED for stage in stages)


def story(stages: Sequence[Stage]) -> list[str]:
    """Return a sentence for each stage, in order."""
    return [_sentence(stage) for stage in stages]


def _sentence(stage: Stage) -> str:
    source, pipeline = stage.get("source", "a model"), stage.get("pipeline") or ""
    if branch := stage.get("branch"):
        source = f"{branch}: {source}"
    conversion = f" through {pipeline} ({stage.get('preserves')})" if pipeline else ""
    if stage.get("kind") != TRAINED:
        stated = stage.get("notes")
        notes = [str(note) for note in stated] if isinstance(stated, list) else []
        more = [f"and {len(notes) - _NOTES:,} more"] if len(notes) > _NOTES else []
        texts = [f"{source} was converted{conversion}", *notes[:_NOTES], *more]
        return "; ".join(texts) + "."
    if stage.get("outside"):
        return f"{source} was trained by a loop outside of moecc."
    if "from_step" in stage:
        start = f"{source} was trained on from its step {stage['from_step']:,}"
    elif stage.get("start") == "random":
        start = f"The architecture of {source}{conversion} was trained from scratch"
    else:
        start = f"{source}{conversion} was trained"
    folders = (name.partition("train/") for name in stage.get("data", {}))
    texts = [name for before, use, name in folders if use and not before]
    on = f" of {', '.join(texts)}" if texts else ""
    recipe = str(stage.get("recipe", ""))[:_DIGITS]
    return (
        f"{start}, up to step {stage.get('steps', 0):,}: {stage.get('tokens', 0):,} tokens{on}, "
        f"by the recipe {recipe}."
    )
