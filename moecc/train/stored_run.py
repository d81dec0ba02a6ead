"""Runs in object stores: trained in a folder of this machine, and uploaded after each step saved.

The store alone decides where a run is: another machine continues it from there. A claim names the
process that trains it and the last step uploaded, so that a listing that lags hides no step; a
later process takes the claim over, and the earlier one notices before its next file.

Several processes share no folder. Each uploads the chunks of arrays that its devices hold with a
record of their digests; the first process, which holds the claim, uploads all else, and step.json
last, which has the digests of all. Each brings the last step to its own folder where it begins.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from secrets import token_hex

from moecc.errors import ALIASES, InputError
from moecc.formats.files import (
    files_below,
    make_folder,
    os_errors,
    read_whole,
    remove,
    require_removed,
)
from moecc.formats.run import (
    GRAPH,
    LINEAGE,
    METRICS,
    RECIPE,
    SOURCE,
    SPEED,
    STATE,
    STEP,
    STEPS,
    SavedStep,
    is_run,
    mirrored_run,
    saved_steps,
)
from moecc.formats.store import TRANSFERS, get_file
from moecc.formats.upload import LAST_FILES, StoreOutput, member_stage
from moecc.train.events import TrainJob
from moecc.train.run import locked_run, part_name, read_part

_TRAINING = "training"
"""The first word of the claim of a run, before its last step."""

_RECORD = re.compile(rf"{STEPS}/(\d+)/{STEP}")
_STEP_FILE = re.compile(rf"{STEPS}/(\d+)/.*", re.DOTALL)
_FIXED = (RECIPE, GRAPH, LINEAGE)
_JOURNALS = (METRICS, SPEED)


class StoredRun(StoreOutput):
    """A run in an object store; see `StoreOutput`.

    Attributes:
      stage: the folder of this machine in which it is trained; of several processes, each has one.
    """

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self._process = 0
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
        create = (lambda: self._begin(job.create)) if is_new else self._resume_run
        return replace(job, run=self.stage, create=create, store=self)

    def enter(self, process: int, writer: str) -> Path:
        """Return the folder of one of several processes; see `RunStore`.

        Processes of one machine, or of one cache folder, have different ones.
        """
        self._process, self._writer = process, writer
        if process:
            self.stage = member_stage(self.stage, process)
            ALIASES[str(self.stage)] = str(self.address)
        return self.stage

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
        with locked_run(self.stage) if not self._process else nullcontext():
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
        steps = {step.number: step for step in saved_steps(self.stage)}
        last, present = max(steps, default=0), self._names()
        names = {p.relative_to(self.stage).as_posix() for p in files_below(self.stage)}
        for name in sorted(names, key=lambda n: (_order(n), n)):
            # An export is written beside this thread, under a name that begins with a dot.
            if not _STEP_FILE.fullmatch(name) and "/." not in name:
                self._put(name, present)
        complete = _complete_steps(present)
        for number in steps.keys() - complete:
            # What a killed process left of this step may have the sizes of its files.
            prefix, record = f"{STEPS}/{number}/", f"{STEPS}/{number}/{STEP}"
            below = {name for name in names if name.startswith(prefix)}
            self._each(lambda name: self._put(name, {}), below - {record})
            listed = {f"{prefix}{STATE}/{name}" for name in steps[number].facts.files}
            for name in sorted(n for n in present if n.startswith(prefix)):
                if name not in below | listed:
                    self._remove(name)
            self._put(record, {})
        self._require_held()
        self._claim(_TRAINING, str(last))
        old = {n for n in complete if n < last} - steps.keys()
        removed = [m for name in present if (m := _STEP_FILE.fullmatch(name))]
        removed = [m for m in removed if int(m[1]) in old or int(m[1]) not in complete | set(steps)]
        # A step without its record is no step, whatever else is still in it.
        self._each(self._remove, (m[0] for m in removed if _RECORD.fullmatch(m[0])))
        self._each(self._remove, (m[0] for m in removed if not _RECORD.fullmatch(m[0])))

    def finish(self, *, is_done: bool) -> None:
        """Upload what is new, and remove the stage of a run that is done. Raises as `put_run`."""
        if not self._process:
            self.put_run()
        if is_done or self._process:
            require_removed(self.stage, "the run is complete, but its staging folder remains")
        if is_done and not self._process:
            self._writer_file.unlink(missing_ok=True)

    def put_part(self, number: int) -> None:
        """Upload what this process wrote of a step, its record last, and remove it here."""
        folder = self.stage / STEPS / str(number)
        record = folder / part_name(self._process)
        self._each(
            lambda name: self._put_file(folder / STATE / name, f"{STEPS}/{number}/{STATE}/{name}"),
            read_part(record).files,
        )
        self._put_file(record, f"{STEPS}/{number}/{record.name}")
        remove(self.stage / STEPS)
        make_folder(self.stage / STEPS)

    def get_parts(self, number: int, processes: int) -> None:
        """Bring the records of the other processes, whose uploads are complete, to the stage."""
        for process in range(1, processes):
            self._get(f"{STEPS}/{number}/{part_name(process)}", {})

    def put_record(self, number: int) -> None:
        """Upload the record of a step again, to which its evaluation was added."""
        name = f"{STEPS}/{number}/{STEP}"
        self._require_held()
        self._put_file(self.stage / name, name)

    def fetch(self) -> None:
        """Bring the last step of the claim, which the first process holds, to the stage."""
        self._require_held()
        self._bring(self._last_claimed())

    def complete(self, number: int) -> None:
        """Bring the arrays of a step to the stage, those that it has not."""
        step = SavedStep(number, self.stage / STEPS / str(number))
        sizes = {
            (step.state / name).relative_to(self.stage).as_posix(): record.size_bytes
            for name, record in step.facts.files.items()
        }
        missing = [
            name
            for name, size in sizes.items()
            if not (path := self.stage / name).is_file() or path.stat().st_size != size
        ]
        self._each(lambda name: self._get(name, sizes), missing)

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

    def _resume_run(self) -> None:
        """Claim the run, and bring the stage to its last step. Raises as `put_run`."""
        head = self._last_claimed()
        self._claim(_TRAINING, str(head))
        last = max({*_complete_steps(self._names()), head})
        self._bring(last)
        for step in saved_steps(self.stage):
            # A later one is uploaded, unless other processes wrote a part of it.
            arrays = (step.state / name for name in step.facts.files)
            if step.number > last and not all(path.is_file() for path in arrays):
                remove(step.folder)
        self.put_run()

    def _last_claimed(self) -> int:
        """Return the step of the claim, the last one uploaded; 0 without a claim of a training."""
        claim = self._claimed().split()
        return int(claim[1]) if claim[:1] == [_TRAINING] and claim[1].isdecimal() else 0

    def _bring(self, last: int) -> None:
        """Bring the run with its last step to the stage. Raises as `put_run`."""
        present = self._names()
        records = [
            f"{STEPS}/{number}/{STEP}" for number in sorted({*_complete_steps(present), last})
        ]
        sources = [name for name in present if name.startswith(f"{SOURCE}/")]
        names = [*_FIXED, *sources, *(records[-1:] if last else [])]
        if not all(self._is_same(name) for name in names):
            self.clear_stage()
            journals = [name for name in _JOURNALS if name in present and not self._process]
            # The last record comes last: where it is, all before it is whole.
            for name in [*journals, *_FIXED, *sources, *(records if last else [])]:
                self._get(name, present if name in _JOURNALS else {})
            make_folder(self.stage / STEPS)
        if last:
            self.complete(last)

    def _is_same(self, name: str) -> bool:
        """Return whether a file of the stage is as the store has it."""
        path = self.stage / name
        return path.is_file() and read_whole(path) == self._read(name)

    def _each(self, work: Callable[[str], None], names: Iterable[str]) -> None:
        """Do something for each file, several at the same time."""
        with ThreadPoolExecutor(TRANSFERS) as threads:
            list(threads.map(work, sorted(names)))

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

    def _require_held(self) -> None:
        # The claim's last step changes; its writer is that of all processes of a run.
        if not (self._process and self._claimed().endswith(f" {self._writer}")):
            super()._require_held()

    def _lost_hint(self) -> str:
        return "let it finish; the same command continues the run afterwards"


def _complete_steps(names: Iterable[str]) -> set[int]:
    """Return the steps of a run whose records are among its files."""
    return {int(match[1]) for name in names if (match := _RECORD.fullmatch(name))}


def _order(name: str) -> int:
    """Return when a file is uploaded: a run is one by its lineage, a model by its manifest."""
    if name == LINEAGE:
        return len(LAST_FILES) + 1
    last = name.rpartition("/")[2]
    return LAST_FILES.index(last) + 1 if last in LAST_FILES and not name.startswith(SOURCE) else 0
