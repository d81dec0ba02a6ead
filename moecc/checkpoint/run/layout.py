"""The layout of a run folder, and the steps that it holds.

::

    recipe.toml      everything that decides the run, defaults included
    lineage.json     source, pipeline, recipe and data, with their digests
    graph.moe        the model; its parameters are tensors of the state, by their own names
    source/          config, tokenizer and licences of the source, and its manifest
    metrics.jsonl    what was measured, a line an event
    steps/N/state/   parameters, moments and counters after N steps, as Orbax writes them
    steps/N/step.json    written last: a step without it is not complete
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path

from moecc.checkpoint.files import link_fault, read_bounded
from moecc.checkpoint.jsonfile import parse_json_object, read_json_object
from moecc.checkpoint.problems import Problems, describe
from moecc.checkpoint.records import seal
from moecc.errors import InputError, nearest
from moecc.support.untyped import Json, JsonDict

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
