"""The digests of a saved step, and whether its files still have them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from moecc.checkpoint.files import read_bounded
from moecc.checkpoint.manifest import file_records, seal
from moecc.checkpoint.problems import Problems, quoted
from moecc.checkpoint.run.layout import STEP, SavedStep
from moecc.errors import CheckError, Problem
from moecc.support.untyped import Json

_SEAL = b',\n"seal": "'
_MAX_BYTES = 64 << 20


def digests(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, object]]:
    """Return size and digest of `files` by their paths in `folder`."""
    named = {path.relative_to(folder).as_posix(): path for path in files}
    return {
        name: {"size_bytes": record.size_bytes, "sha256": record.sha256}
        for name, record in file_records(named).items()
    }


def check_step(run: Path, step: SavedStep) -> None:
    """Compare the files of a step, and those of its run, with their digests.

    Raises:
      CheckError: a file is missing or differs; all of them.
      MachineError: a file cannot be read.
    """
    path = step.folder / STEP
    data = read_bounded(path, _MAX_BYTES)
    if seal(data[: max(0, data.rfind(_SEAL))]) != data:
        what = "step.json was changed after it was written: its seal does not match its content"
        raise CheckError(what, where=str(path))
    problems = Problems()
    for folder, key in ((step.state, "files"), (run, "run_files")):
        problems.extend(_differences(folder, step.facts.get(key, {})))
    problems.raise_if_any(CheckError)


def _differences(folder: Path, expected: Json) -> list[Problem]:
    there = {name: folder / name for name in expected if (folder / name).is_file()}
    found = digests(folder, there.values())
    missing = [
        Problem(f"the file {quoted(name)} is missing", str(folder))
        for name in expected
        if name not in there
    ]
    changed = [
        Problem(
            "the file differs from the one that moecc wrote", str(folder / name),
            str(expected[name].get("sha256")), str(record["sha256"]),
        )
        for name, record in found.items()
        if record != expected[name]
    ]  # fmt: skip
    return missing + changed
