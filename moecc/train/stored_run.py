"""Runs in object stores: trained in a folder of this machine, and uploaded after each step saved.

The store alone decides where a run is: another machine continues it from there. A claim names the
process that trains it and the last step uploaded, so that a listing that lags hides no step; a
later process takes the claim over, and the earlier one notices before its next file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from secrets import token_hex

from moecc.errors import ALIASES, InputError
from moecc.formats.arrays import files_below
from moecc.formats.files import make_folder, os_errors, read_whole, remove, require_removed
from moecc.formats.run import (
    GRAPH,
    LINEAGE,
    METRICS,
    RECIPE,
    SOURCE,
    SPEED,
    STEP,
    STEPS,
    SavedStep,
    is_run,
    mirrored_run,
    saved_steps,
)
from moecc.formats.store import get_file
from moecc.formats.upload import LAST_FILES, StoreOutput
from moecc.train.events import TrainJob
from moecc.train.run import locked_run

_TRAINING = "training"
"""The first word of the claim of a run, before its last step."""

_RECORD = re.compile(rf"{STEPS}/(\d+)/{STEP}")
_STEP_FILE = re.compile(rf"{STEPS}/(\d+)/.*", re.DOTALL)
_FIXED = (RECIPE, GRAPH, LINEAGE)
_JOURNALS = (METRICS, SPEED)


class StoredRun(StoreOutput):
    """A run in an object store; see `StoreOutput`.

    Attributes:
      stage: the folder of this machine in which it is trained.
    """

    def __init__(self, address: str) -> None:
        super().__init__(address)
        ALIASES[str(self.stage)] = str(self.address)
        self._uploaded: dict[str, tuple[int, int]] = {}

    def mirror(self) -> Path | None:
        """Return the local mirror of the run; None where the store has nothing at its address.

        Raises:
          InputError: there is something else.
          MachineError: the store denies access, or does not answer.
        """
        self._require_free(self._claimed(), "")
        names = self._names()
        if not names:
            return None
        run = mirrored_run(str(self.address))
        if not is_run(run) and not self._is_begun(names):
            raise InputError(
                "the folder is not empty, and no run",
                where=str(self.address),
                found=f"{len(names):,} files, {min(names)!r} among them",
                hint="give another folder",
            )
        return run if is_run(run) else None

    def job(self, job: TrainJob, *, is_new: bool) -> TrainJob:
        """Return a job of the run, whose folder is the stage.

        Args:
          job: over the mirror, or of a new run in the stage.
          is_new: whether the run is made.
        """
        create = (lambda: self._begin(job.create)) if is_new else self._fetch
        return replace(job, run=self.stage, create=create, publish=self.put_run)

    def clear_stage(self) -> None:
        """Remove what an earlier process left in the stage, and make the folders around it.

        Raises:
          InputError: another process trains the run on this machine.
          MachineError: it cannot be removed.
        """
        for folder in reversed(self.stage.parents):
            make_folder(folder)
        if not self.stage.is_dir():
            return
        with locked_run(self.stage):
            # Renamed first: processes of one training may come here at the same time.
            old = self.stage.with_name(f".{self.stage.name}.{token_hex(4)}")
            with suppress(FileNotFoundError), os_errors(self.stage, "remove"):
                os.rename(self.stage, old)
        remove(old)

    def put_run(self) -> None:
        """Upload what is new, each step with its record last, and remove the steps left out.

        Raises:
          InputError: another process took the run over.
          MachineError: the store denies access, or does not answer.
        """
        steps = [step.number for step in saved_steps(self.stage)]
        last, present = max(steps, default=0), self._names()
        names = {p.relative_to(self.stage).as_posix() for p in files_below(self.stage)}
        for name in sorted(names, key=lambda n: (_order(n), n)):
            # An export is written beside this thread, under a name that begins with a dot.
            if not _STEP_FILE.fullmatch(name) and "/." not in name:
                self._put(name, present)
        complete = {int(m[1]) for name in present if (m := _RECORD.fullmatch(name))}
        for number in set(steps) - complete:
            # What a killed process left of this step may have the sizes of its files.
            prefix = f"{STEPS}/{number}/"
            below = {name for name in names if name.startswith(prefix)}
            for name in sorted(below, key=lambda n: (bool(_RECORD.fullmatch(n)), n)):
                self._put(name, {})
            for name in sorted(n for n in present if n.startswith(prefix) and n not in below):
                self._remove(name)
        self._require_held()
        self._claim(_TRAINING, str(last))
        old = {n for n in complete if n < last} - set(steps)
        for name in sorted(present, key=lambda n: (not _RECORD.fullmatch(n), n)):
            match = _STEP_FILE.fullmatch(name)
            if match and (int(match[1]) in old or int(match[1]) not in complete | set(steps)):
                self._remove(name)

    def finish(self, *, is_done: bool) -> None:
        """Upload what is new, and remove the stage of a run that is done. Raises as `put_run`."""
        self.put_run()
        if is_done:
            require_removed(self.stage, "the run is complete, but its staging folder remains")
            self._writer_file.unlink(missing_ok=True)

    def _begin(self, create: Callable[[], None]) -> None:
        """Claim an address without a run, and make the run. Raises as `put_run`."""
        self._claim(_TRAINING, "0")
        names = self._names()
        if LINEAGE in names:
            hint = "the same command continues that one"
            raise InputError("another process began a run", where=str(self.address), hint=hint)
        for name in sorted(names):  # of an attempt that was cut off
            self._remove(name)
        create()
        self.put_run()

    def _fetch(self) -> None:
        """Claim the run, and bring the stage to its last step. Raises as `put_run`."""
        claim = self._claimed().split()
        head = int(claim[1]) if claim[:1] == [_TRAINING] and claim[1].isdecimal() else 0
        self._claim(_TRAINING, str(head))
        present = self._names()
        complete = {int(m[1]) for name in present if (m := _RECORD.fullmatch(name))}
        last = max({*complete, head})
        sources = [name for name in present if name.startswith(f"{SOURCE}/")]
        names = [*_FIXED, *sources, *([f"{STEPS}/{last}/{STEP}"] if last else [])]
        if not self._has(names, last):
            self.clear_stage()
            for name in [*names, *(f"{STEPS}/{number}/{STEP}" for number in complete)]:
                self._get(name, present)
            for name in _JOURNALS:
                if name in present:
                    self._get(name, present)
            make_folder(self.stage / STEPS)
            if last:
                step = SavedStep(last, self.stage / STEPS / str(last))
                for name, record in step.facts.files.items():
                    name = (step.state / name).relative_to(self.stage).as_posix()
                    self._get(name, {name: record.size_bytes})
        self.put_run()

    def _has(self, names: list[str], last: int) -> bool:
        """Return whether the stage has files as the store has them, and the arrays of a step."""
        for name in names:
            path = self.stage / name
            if not path.is_file() or read_whole(path) != self._read(name):
                return False
        if not last:
            return True
        step = SavedStep(last, self.stage / STEPS / str(last))
        return all(
            (step.state / name).is_file() and (step.state / name).stat().st_size == r.size_bytes
            for name, r in step.facts.files.items()
        )

    def _get(self, name: str, sizes: dict[str, int]) -> None:
        path = self.stage / name
        if name in sizes:
            get_file(self._system, self._file(name), path, sizes[name])
        else:
            data = self._read(name)
            with os_errors(path, "write"):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)

    def _put(self, name: str, present: dict[str, int]) -> None:
        """Upload a file of the stage, unless it is there already."""
        status = (self.stage / name).stat()
        state = status.st_size, status.st_mtime_ns
        is_new = present.get(name) != status.st_size or name in _JOURNALS
        if is_new and self._uploaded.get(name) != state:
            self._put_file(self.stage / name, name)
            self._uploaded[name] = state

    def _is_begun(self, names: dict[str, int]) -> bool:
        """Return whether all files are those of a run whose first upload was cut off."""
        return self._claimed().startswith(_TRAINING) and LINEAGE not in names

    def _require_free(self, claim: str, content: str) -> None:
        if not claim.startswith(_TRAINING):
            super()._require_free(claim, content)

    def _lost_hint(self) -> str:
        return "let it finish; the same command continues the run afterwards"


def _order(name: str) -> int:
    """Return when a file is uploaded: a run is one by its lineage, a model by its manifest."""
    if name == LINEAGE:
        return len(LAST_FILES) + 1
    last = name.rpartition("/")[2]
    return LAST_FILES.index(last) + 1 if last in LAST_FILES and not name.startswith(SOURCE) else 0
