"""Run folders of ``moecc train`` as checkpoints: their layout, and the state that they hold."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite, prod
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from moecc.errors import CheckError, InputError, MoeccError, Problem, nearest
from moecc.formats.adapter import models_of
from moecc.formats.files import (
    Identity,
    identify,
    link_fault,
    read_bounded,
    read_json_object,
    require_unchanged,
)
from moecc.formats.folder import find_companions
from moecc.formats.manifest import MANIFEST_NAME, FileRecord, file_records, load, seal
from moecc.formats.source import Checkpoint, GivenParams, TensorInfo
from moecc.formats.trees.arrays import ZarrArrays
from moecc.support.documents import parse_json_object
from moecc.support.problems import Problems, describe, quoted
from moecc.support.process import Closing
from moecc.support.text import amount
from moecc.support.untyped import Json, JsonDict
from moecc.types import DTYPES, Array

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
_MAX_JSON_BYTES = 64 << 20
_SEAL = b',\n"seal": "'


_LARGEST = 1 << 63
_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_count(value: object) -> bool:
    """Return whether a JSON value is an integer of 64 bits that is not negative."""
    return type(value) is int and 0 <= value < _LARGEST


def is_number(value: object) -> bool:
    """Return whether a JSON value is a number that a float can hold."""
    if type(value) is int:
        return abs(value) < _LARGEST
    return isinstance(value, float) and isfinite(value)


def _is_counts(value: object) -> bool:
    return isinstance(value, list) and all(map(is_count, value))


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_digests(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(record, dict)
        and is_count(record.get("size_bytes"))
        and isinstance(record.get("sha256"), str)
        and _SHA256.fullmatch(record["sha256"]) is not None
        for record in value.values()
    )


def _is_stages(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


_Form = tuple[Callable[[object], bool], str]
_COUNT: _Form = (is_count, "an integer, 0 or more")
_OBJECT: _Form = (_is_object, "an object")
_TEXT: _Form = (_is_text, "a text")
_DIGESTS: _Form = (_is_digests, "size_bytes and sha256 by the paths of files")

_STEP_FORMS: Mapping[str, _Form] = {
    "tokens": _COUNT,
    "left_out": (_is_counts, "a list of integers, 0 or more"),
    "loss": (lambda value: value is None or is_number(value), "a number or null"),
    "tensors": _OBJECT,
    "files": _DIGESTS,
    "run_files": _DIGESTS,
}
_LINEAGE_FORMS: Mapping[str, _Form] = {
    "card": _OBJECT,
    "stages": (_is_stages, "a list of objects, one at least"),
}
_STAGE_FORMS: Mapping[str, _Form] = {
    **dict.fromkeys(("kind", "source", "pipeline", "preserves", "start", "recipe"), _TEXT),
    **dict.fromkeys(("from_step", "steps", "tokens"), _COUNT),
    "data": _OBJECT,
    "recipe_toml": _TEXT,
}


def _check_forms(
    facts: Mapping[str, object], forms: Mapping[str, _Form], where: str, problems: Problems
) -> None:
    """Add a problem for each key whose value has another form; a key may be absent."""
    for key, (is_right, expected) in forms.items():
        if key in facts and not is_right(facts[key]):
            found = describe(facts[key])
            problems.add("not what moecc wrote", where=f"{where}: {key}", expected=expected,
                         found=found)  # fmt: skip


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
    def facts(self) -> Json:
        """The content of ``step.json``.

        Raises:
          InputError: it was changed after it was written, is of another version, or a value has
            another form.
        """
        path = self.folder / STEP
        data = read_bounded(path, _MAX_JSON_BYTES)
        if seal(data[: max(0, data.rfind(_SEAL))]) != data:
            raise InputError(
                "step.json was changed after it was written: its seal does not match its content",
                where=str(path), hint="restore the file, or use another checkpoint of the run",
            )  # fmt: skip
        found = parse_json_object(data, str(path))
        if found.get("schema") != STEP_SCHEMA or found.get("step") != self.number:
            raise InputError(
                "the step is of another version of moecc, or was moved",
                where=str(path),
                expected=f'"schema": "{STEP_SCHEMA}", "step": {self.number}',
                found=f'"schema": {describe(found.get("schema"))}, '
                f'"step": {describe(found.get("step"))}',
            )
        problems = Problems()
        _check_forms(found, _STEP_FORMS, str(path), problems)
        problems.raise_if_any()
        return found

    @property
    def loss(self) -> float | None:
        """The held-out loss at this step, if it was evaluated then."""
        loss = self.facts.get("loss")
        return float(loss) if isinstance(loss, int | float) else None


def is_run(path: str | os.PathLike[str]) -> bool:
    """Return whether a folder is the run of a training."""
    folder = Path(path)
    return os.path.isfile(folder / GRAPH) and os.path.isfile(folder / LINEAGE)


def split_reference(text: str) -> tuple[str, str] | None:
    """Return folder and step of ``RUN``, ``RUN@best`` or ``RUN@1200``; None if it is no run."""
    if is_run(text):
        return text, LAST
    folder, at, step = text.rpartition("@")
    return (folder, step) if at and is_run(folder) else None


def saved_steps(run: Path) -> list[SavedStep]:
    """Return the complete checkpoints of a run, the last one last."""
    steps = run / STEPS
    if not steps.is_dir():
        return []
    names = [name for name in os.listdir(steps) if name.isdecimal() and str(int(name)) == name]
    found = [SavedStep(int(name), steps / name) for name in names]
    return sorted((s for s in found if (s.folder / STEP).is_file()), key=lambda s: s.number)


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
            "the run has no checkpoint yet", where=str(run), hint="moecc train --resume goes on"
        )
    if which == LAST:
        return steps[-1]
    if which == BEST:
        if (found := best_step(steps)) is None:
            raise InputError(
                "no checkpoint of the run was evaluated", where=f"{run}@{BEST}",
                hint=f"its steps: {numbers}",
            )  # fmt: skip
        return found
    chosen = next((s for s in steps if str(s.number) == which), None)
    if chosen is None:
        names = [BEST, LAST, *(str(s.number) for s in steps)]
        raise InputError(
            "the run has no such checkpoint", where=f"{run}@{which}",
            expected=f"best, last, or one of the steps {numbers}", hint=nearest(which, names),
        )  # fmt: skip
    return chosen


def read_lineage(run: Path) -> JsonDict:
    """Return the content of ``lineage.json``.

    Raises:
      InputError: it is missing, or of another version.
    """
    path = run / LINEAGE
    found = read_json_object(path, limit_bytes=_MAX_JSON_BYTES)
    if found.get("schema") != LINEAGE_SCHEMA:
        raise InputError(
            "the run is of a version that this moecc does not read", where=str(path),
            expected=f'"schema": "{LINEAGE_SCHEMA}"',
            found=f'"schema": {describe(found.get("schema"))}',
        )  # fmt: skip
    problems = Problems()
    _check_forms(found, _LINEAGE_FORMS, str(path), problems)
    problems.raise_if_any()
    stages = found.get("stages", [])
    assert isinstance(stages, list), "its form is checked"
    for number, stage in enumerate(stages):
        _check_forms(stage, _STAGE_FORMS, f"{path}: stages.{number}", problems)
    problems.raise_if_any()
    return found


def run_stages(run: Path) -> list[JsonDict]:
    """Return the stages that led to a run, its own last. Raises InputError; see `read_lineage`."""
    stages = read_lineage(run).get("stages")
    if not stages:
        raise InputError("the lineage of the run has no stages", where=str(run / LINEAGE))
    return list(stages)


def check_inside(run: Path, step: SavedStep) -> None:
    """Check that no link leads out of a run, among the files of a step and of its source.

    Raises:
      InputError: links that do; all of them.
    """
    problems = Problems()
    for path in _links(run, step):
        if (fault := link_fault(path, run)) is not None:
            problems.extend((fault,))
    problems.raise_if_any()


def _links(run: Path, step: SavedStep) -> Iterator[Path]:
    """Yield the symbolic links of a step and of its run."""
    own = [run / name for name in (RECIPE, LINEAGE, GRAPH, METRICS, STEPS, SOURCE)]
    yield from (path for path in (*own, step.folder) if path.is_symlink())
    for top in (run / SOURCE, step.folder):
        for folder, folders, files in os.walk(top):
            entries = (Path(folder, name) for name in (*folders, *files))
            yield from (path for path in entries if path.is_symlink())


# The digests of a saved step, and whether its files still have them.

_STATE, _RUN = "files", "run_files"
"""The keys of ``step.json`` with the digests of the state, and of the run's own files."""

_records: dict[tuple[Path, Identity], FileRecord] = {}
"""The files that this process has hashed while it checked steps."""
_hashing = threading.Lock()


def digests(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, object]]:
    """Return size and digest of `files` by their paths in `folder`."""
    named = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: _to_json(record) for name, record in file_records(named).items()}


def check_step(run: Path, step: SavedStep) -> None:
    """Compare the files of a step, and those of its run, with their digests.

    Raises:
      CheckError: a file is missing or differs, or step.json is not what moecc wrote; all problems.
      InputError: a link leads out of the run.
      MachineError: a file cannot be read.
    """
    check_inside(run, step)
    problems = Problems()
    try:
        for folder, key in ((step.state, _STATE), (run, _RUN)):
            problems.extend(_differences(folder, _digests_of(step, key)))
    except InputError as error:
        raise CheckError(error.problems) from None
    problems.raise_if_any(CheckError)


def require_run_files(step: SavedStep) -> None:
    """Require graph, recipe, lineage and source of a step's run to be as they were saved.

    Raises:
      InputError: a file is missing or differs; all of them.
      MachineError: a file cannot be read.
    """
    _require(step, step.folder.parent.parent, _RUN)


def require_state(step: SavedStep) -> None:
    """Require the arrays of a step to be as they were saved; a process hashes each file once.

    Raises: as `require_run_files`.
    """
    _require(step, step.state, _STATE)


def _require(step: SavedStep, folder: Path, key: str) -> None:
    try:
        problems = _differences(folder, _digests_of(step, key))
    except InputError as error:
        problems = list(error.problems)
    if problems and not (step.folder / STEP).is_file():
        problems = [step_removed(step.folder)]
    if problems:
        raise InputError(problems)


def step_removed(folder: Path) -> Problem:
    """Return the problem of a step that training removed while it was read."""
    return Problem(
        "the checkpoint was removed while it was read", str(folder),
        hint="a run keeps its last run.keep checkpoints; try once more, or RUN@best",
    )  # fmt: skip


def _digests_of(step: SavedStep, key: str) -> Mapping[str, object]:
    """Return the digests that ``step.json`` records, by paths that stay in their folder."""
    recorded, where = step.facts.get(key), str(step.folder / STEP)
    if not isinstance(recorded, dict):
        raise InputError(f"step.json has no digests: {key!r} is missing", where=where)
    problems = Problems()
    for name in recorded:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name:
            problems.add(f"the file {quoted(name)} is not in the folder of the run", where=where)
    problems.raise_if_any()
    return recorded


def _differences(folder: Path, expected: Mapping[str, object]) -> list[Problem]:
    present = {name: folder / name for name in expected if (folder / name).is_file()}
    problems = [
        Problem(f"the file {quoted(name)} is missing", str(folder))
        for name in expected
        if name not in present
    ]
    for name, record in _hashed(present).items():
        recorded, saved = expected[name], _to_json(record)
        if recorded != saved:
            digest = recorded.get("sha256") if isinstance(recorded, dict) else recorded
            problems.append(
                Problem(
                    "the file differs from the one that moecc wrote", str(folder / name),
                    str(digest), str(record.sha256),
                    hint="restore the file, or use another checkpoint of the run",
                )
            )  # fmt: skip
    return problems


def _hashed(files: Mapping[str, Path]) -> dict[str, FileRecord]:
    with _hashing:
        keys = {name: (path.absolute(), identify(path)) for name, path in files.items()}
        unknown = {name: files[name] for name, key in keys.items() if key not in _records}
        _records.update((keys[n], record) for n, record in file_records(unknown).items())
        return {name: _records[key] for name, key in keys.items()}


def _to_json(record: FileRecord) -> dict[str, object]:
    return {"size_bytes": record.size_bytes, "sha256": record.sha256}


# The arrays of a saved state: zarr in one database, as Orbax writes them.


def array_key(*parts: str) -> str:
    """Return the name of an array in a saved tree, as Orbax joins its keys."""
    return ".".join(parts)


class StateReader(ZarrArrays):
    """Reads arrays of a saved state by name, any box at a time; thread-safe.

    Args:
      folder: the state, ``steps/N/state``.

    Raises:
      MachineError: tensorstore is missing.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)

    def _unreadable(self, key: str, error: Exception) -> InputError:
        if self._folder.is_dir():
            return super()._unreadable(key, error)
        return InputError([step_removed(self._folder)])


# A step of a run as a checkpoint: the parameters of its state, and the files of its source.

CONFIG = "config.json"
_MAX_CONFIG_BYTES = 16 << 20


class RunCheckpoint(Closing):
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
        self.lineage: Json = read_lineage(run)
        self.config = read_json_object(run / SOURCE / CONFIG, limit_bytes=_MAX_CONFIG_BYTES)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(_tensors(step))
        problems = Problems()
        self._companions = find_companions(run / SOURCE, problems)
        problems.raise_if_any()
        files = [*_state_files(step), *self.files(), *self._companions.values()]
        self._identities: dict[Path, Identity] = {path: identify(path) for path in files}

    @cached_property
    def state(self) -> StateReader:
        """What reads parameters and moments, once their files have the digests of step.json.

        Raises:
          InputError: a file is missing or differs; all of them.
          MachineError: tensorstore is missing.
        """
        require_state(self.step)
        return StateReader(self.step.state)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows [start, stop) of the first axis of a parameter; thread-safe.

        Raises:
          InputError: there is no such parameter, or it is not as it was saved.
          MachineError: tensorstore is missing.
        """
        if name not in self.tensors:
            raise InputError(f"there is no tensor {name!r}", where=str(self.step.folder))
        return self.state.read(array_key(PARAMS, name), start, stop)

    def companions(self) -> dict[str, Path | bytes]:
        """Return the files of the source that an export copies, by name."""
        return dict(self._companions)

    def remarks(self) -> list[str]:
        """Return how far the model was trained."""
        tokens = self.step.facts.get("tokens", 0)
        return [f"trained for {amount(self.step.number, 'step')}, {tokens:,} tokens"]

    def card(self) -> dict[str, tuple[str, ...]]:
        """Return what is kept of the source's card."""
        found = self.lineage.get("card", {})
        kept = found if isinstance(found, dict) else {}
        return {str(k): tuple(map(str, v)) for k, v in kept.items() if isinstance(v, list)}

    def files(self) -> list[Path]:
        """Return graph, recipe, lineage, config and step.json, which has digests of the state."""
        named = [self.run / name for name in (GRAPH, RECIPE, LINEAGE)]
        return [self.step.folder / STEP, *named, self.run / SOURCE / CONFIG]

    def require_unchanged(self) -> None:
        """Raise InputError if a file, companions included, changed since it was opened."""
        require_unchanged(self._identities)

    def close(self) -> None:
        """Close the files."""


def inputs_of(checkpoint: Checkpoint | None) -> list[Path]:
    """Return what of a checkpoint an output must not touch: of a run, all but room for exports."""
    if checkpoint is None:
        return []
    if isinstance(checkpoint, RunCheckpoint):
        return [checkpoint.run / STEPS, checkpoint.run / SOURCE]
    return [model.path for model in models_of(checkpoint).values()]


def open_run(reference: str) -> RunCheckpoint:
    """Open ``RUN``, ``RUN@best`` or ``RUN@1200``.

    Raises:
      InputError: it is no run, or has no such checkpoint.
    """
    found = split_reference(reference)
    if found is None:
        raise InputError("this is not the folder of a run", where=reference)
    run, which = Path(found[0]), found[1]
    return RunCheckpoint(run, choose_step(run, which))


def _state_files(step: SavedStep) -> list[Path]:
    return sorted(path for path in step.state.rglob("*") if path.is_file())


def _tensors(step: SavedStep) -> dict[str, TensorInfo]:
    listed = step.facts.get("tensors")
    if not isinstance(listed, dict):
        raise InputError("step.json lists no tensors", where=str(step.folder / STEP))
    return {name: _info(step, name, facts) for name, facts in listed.items()}


def _info(step: SavedStep, name: str, facts: object) -> TensorInfo:
    where = str(step.folder / STEP)
    if not isinstance(facts, dict) or facts.get("dtype") not in DTYPES:
        raise InputError(f"step.json does not give the type of {name!r}", where=where)
    shape, dtype = facts.get("shape"), DTYPES[facts["dtype"]]
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise InputError(f"step.json does not give the shape of {name!r}", where=where)
    nbytes = prod(shape) * dtype.itemsize_bytes
    return TensorInfo(name, dtype, tuple(shape), nbytes, step.state, 0)


# The stages from a first source to a checkpoint: conversions and trainings, and their story.

CONVERTED, TRAINED = "convert", "train"
"""The kinds of stages."""

Stage = Json

_DIGITS = 19
"""So much of a digest is shown: ``sha256:`` and twelve digits."""


def stages_of(checkpoint: Checkpoint) -> list[Stage]:
    """Return the stages that led to a checkpoint, as far as it tells: a run, or a conversion."""
    if isinstance(checkpoint, RunCheckpoint):
        *earlier, last = run_stages(checkpoint.run)
        step = checkpoint.step
        return [*earlier, {**last, "steps": step.number, "tokens": step.facts.get("tokens", 0)}]
    if isinstance(checkpoint, GivenParams):
        own = {"kind": TRAINED, "source": checkpoint.path.name, "outside": True}
        return [*stages_of(checkpoint.base), own]
    return _converted(checkpoint.path)


def _converted(folder: Path) -> list[Stage]:
    """Return the stages of a conversion, of its manifest; none where there is no sound one."""
    if not (folder / MANIFEST_NAME).is_file():
        return []
    try:
        manifest = load(folder)
    except MoeccError:
        return []  # a conversion does not rely on it
    own = {
        "kind": CONVERTED, "source": manifest.source, "pipeline": manifest.pipeline,
        "preserves": manifest.preserves, "seed": manifest.seed,
    }  # fmt: skip
    return [*manifest.lineage, own]


def is_trained(stages: Sequence[Stage]) -> bool:
    """Return whether a training is among `stages`."""
    return any(stage.get("kind") == TRAINED for stage in stages)


def story(stages: Sequence[Stage]) -> list[str]:
    """Return a sentence for each stage, in order."""
    return [_sentence(stage) for stage in stages]


def _sentence(stage: Stage) -> str:
    source, pipeline = stage.get("source", "a model"), stage.get("pipeline") or ""
    made = f" through {pipeline} ({stage.get('preserves')})" if pipeline else ""
    if stage.get("kind") != TRAINED:
        return f"{source} was converted{made}."
    if stage.get("outside"):
        return f"{source} was trained by a loop outside of moecc."
    if "from_step" in stage:
        start = f"{source} was trained on from its step {stage['from_step']:,}"
    elif stage.get("start") == "random":
        start = f"The architecture of {source}{made} was trained from scratch"
    else:
        start = f"{source}{made} was trained"
    texts = [n for n in stage.get("data", {}) if n != "order" and not n.startswith("evaluate/")]
    on = f" of {', '.join(texts)}" if texts else ""
    recipe = str(stage.get("recipe", ""))[:_DIGITS]
    return (
        f"{start}, up to step {stage.get('steps', 0):,}: {stage.get('tokens', 0):,} tokens{on}, "
        f"by the recipe {recipe}."
    )
