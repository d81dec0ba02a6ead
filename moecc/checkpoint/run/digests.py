"""The digests of a saved step, and whether its files still have them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from moecc.checkpoint.files import Identity, identify
from moecc.checkpoint.manifest import file_records
from moecc.checkpoint.problems import Problems, quoted
from moecc.checkpoint.records import FileRecord
from moecc.checkpoint.run.layout import STEP, SavedStep, check_inside
from moecc.errors import CheckError, InputError, Problem

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
