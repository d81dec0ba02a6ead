"""Write weight expressions as the tensors of files, in bounded memory.

Each distinct expression is read, evaluated and hashed once, a block at a time, and every block is
written at once to all its destinations.  Each thread takes one expression, so that reading and
hashing of one overlap with writing of another; offsets are fixed beforehand, so no byte
depends on the threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from moecc.errors import InputError, Problem, UsageError, printable
from moecc.formats.disk import APPEND, OutputFiles, disk, remove_but, write_durable
from moecc.formats.files import has_digest, name_fault, os_problem, read_bounded
from moecc.formats.gguf.storage import Storage, quantise
from moecc.formats.safetensors import INDEX_NAME, Entry, Shard, index_json, natural, plan_shards
from moecc.support.problems import Problems, quoted
from moecc.types import Array, DType
from moecc.weights.arithmetic import Cast, first_nonfinite
from moecc.weights.evaluate import Evaluator, Reader, ValuesOverflow, same_bytes
from moecc.weights.expr import Expr, row_blocks, sources
from moecc.weights.movement import Tile
from moecc.weights.simplify import simplify

# Detect NaN and infinity in the tensors of a source while they are read.


@dataclass(frozen=True)
class Nonfinite:
    """A source tensor that holds NaN or infinity.

    Attributes:
      tensor: its name.
      index: the index of the first such element.
      value: ``nan``, ``inf`` or ``-inf``.
    """

    tensor: str
    index: tuple[int, ...]
    value: str

    def __str__(self) -> str:
        return f"{self.tensor}: {self.value} at {list(self.index)}"

    def problem(self) -> Problem:
        """Return the problem to report."""
        return Problem(
            "a weight is not finite",
            f"tensor {quoted(self.tensor)}",
            found=f"{self.value} at {list(self.index)}",
            hint="--allow-nonfinite converts it all the same, and records it",
        )


class ScanningReader:
    """A reader that wraps another one and records values that are not finite; thread-safe.

    Args:
      reader: the wrapped reader.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._lock = threading.Lock()
        self._scanned: set[tuple[str, int, int | None]] = set()
        self._found: dict[str, Nonfinite] = {}
        self._zero: dict[str, bool] = {}

    @property
    def found(self) -> tuple[Nonfinite, ...]:
        """The tensors found so far, sorted by name."""
        with self._lock:
            return tuple(self._found[name] for name in sorted(self._found))

    @property
    def zeros(self) -> tuple[str, ...]:
        """The matrices of which nothing but zeros was read, sorted by name."""
        with self._lock:
            return tuple(sorted(name for name, is_zero in self._zero.items() if is_zero))

    def recall(self, read: Iterable[str], found: Iterable[Nonfinite], zeros: Set[str]) -> None:
        """Add what an earlier run found in the tensors that it read."""
        for one in found:
            self._add(one)
        for name in read:
            self._note_zero(name, name in zeros)

    def __call__(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows [start, stop) of a tensor."""
        values = self._reader(name, start, stop)
        with self._lock:
            known = (name, start, stop) in self._scanned
            self._scanned.add((name, start, stop))
        if not known:
            self._scan(name, start, values)
            if values.ndim > 1:
                self._note_zero(name, _is_zero(values))
        return values

    def _scan(self, name: str, start: int, values: Array) -> None:
        at = first_nonfinite(values)
        if at is None:
            return
        place = np.unravel_index(at, values.shape)
        index = tuple(int(i) for i in place)
        if index:
            index = (index[0] + start, *index[1:])
        self._add(Nonfinite(name, index, str(float(values[place]))))

    def _note_zero(self, name: str, is_zero: bool) -> None:
        with self._lock:
            self._zero[name] = is_zero and self._zero.get(name, True)

    def _add(self, found: Nonfinite) -> None:
        """Keep the first element of each tensor; indices are in the order of the elements."""
        with self._lock:
            first = self._found.get(found.tensor)
            if first is None or found.index < first.index:
                self._found[found.tensor] = found


def _is_zero(values: Array) -> bool:
    """Whether all bytes are 0; of most tensors the first few already say no."""
    raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return not raw[:64].any() and not raw.any()


# What a conversion has written so far, in its temporary folder, so that it can be continued.
#
# The first line states what decides the result; then comes a line for each tensor that is
# complete,
# with its digest.  Nothing in it is trusted: what is on the disk is hashed again before it is
# kept,
# so lines need not reach the disk in order, and a torn last line does no harm.

JOURNAL_NAME = "moecc_journal.jsonl"
COMMIT_NAME = "moecc_commit.jsonl"
"""The name of the journal while a file and its manifest are put in place."""
SCHEMA = "moecc.journal/1"
MAX_JOURNAL_BYTES = 1 << 30

Facts = Mapping[str, object]
"""What decides the result of a conversion, by name."""


@dataclass(frozen=True)
class Done:
    """A tensor that is complete, with its copies.

    Attributes:
      name: of the first copy.
      sha256: of its bytes.
      nonfinite: how many of its elements are not finite.
      found: the tensors of the source with NaN or infinity that it was made from.
      zeros: the matrices of the source without anything but zeros that it was made from.
    """

    name: str
    sha256: str
    nonfinite: int = 0
    found: tuple[Nonfinite, ...] = ()
    zeros: tuple[str, ...] = ()

    def line(self) -> bytes:
        """Return its line."""
        found = [[f.tensor, list(f.index), f.value] for f in self.found]
        fields: dict[str, object] = {"name": self.name, "sha256": self.sha256}
        if self.nonfinite or found:
            fields |= {"nonfinite": self.nonfinite, "found": found}
        if self.zeros:
            fields["zeros"] = list(self.zeros)
        return f"{json.dumps(fields)}\n".encode()


class Journal:
    """The journal of one output; thread-safe.

    Attributes:
      known: what an earlier run completed, by the name of the first copy.
    """

    def __init__(self, folder: Path, facts: Facts, known: Mapping[str, Done]) -> None:
        self.known = known
        self._path = folder / JOURNAL_NAME
        self._lock = threading.Lock()
        try:
            self._descriptor = disk().open(self._path, APPEND)
            # After a torn line, a new one begins.
            disk().append(self._descriptor, b"\n" if known else _header(facts))
        except OSError as error:
            raise os_problem(error, self._path, "write") from None

    def note(self, done: Done) -> None:
        """Append a line. Raises MachineError."""
        try:
            with self._lock:
                disk().append(self._descriptor, done.line())
        except OSError as error:
            raise os_problem(error, self._path, "write") from None

    def synchronise(self) -> None:
        """Return once it is on the disk. Raises MachineError."""
        try:
            disk().sync(self._descriptor)
        except OSError as error:
            raise os_problem(error, self._path, "synchronise") from None

    def close(self) -> None:
        """Close the file, which stays."""
        os.close(self._descriptor)

    def remove(self) -> None:
        """Remove the file: the output is complete. Raises MachineError."""
        try:
            disk().unlink(self._path)
        except OSError as error:
            raise os_problem(error, self._path, "remove") from None


def _header(facts: Facts) -> bytes:
    return f"{json.dumps({'schema': SCHEMA, 'facts': facts}, sort_keys=True)}\n".encode()


def has_journal(folder: Path) -> bool:
    """Return whether a partial output can be continued, if by anything."""
    return _journal_of(folder).is_file()


def _journal_of(folder: Path) -> Path:
    journal, commit = folder / JOURNAL_NAME, folder / COMMIT_NAME
    return commit if commit.is_file() and not journal.is_file() else journal


def read_journal(folder: Path, facts: Facts) -> dict[str, Done]:
    """Return what an earlier run of the same conversion completed; nothing if it left no journal.

    Raises:
      InputError: the earlier run was another conversion; all differences.
      MachineError: the file cannot be read.
    """
    if not has_journal(folder):
        return {}
    lines = read_bounded(_journal_of(folder), MAX_JOURNAL_BYTES).split(b"\n")
    first = _object(lines[0])
    stated = first.get("facts")
    if first.get("schema") != SCHEMA or not isinstance(stated, dict):
        return {}
    problems = list(_differences(stated, json.loads(json.dumps(facts)), str(folder)))
    if problems:
        raise InputError(problems)
    known = {}
    for line in lines[1:-1]:  # the last one is torn, or empty
        done = _done(_object(line))
        if done is not None:
            known[done.name] = done
    return known


def _differences(
    before: dict[str, Any], now: dict[str, Any], where: str, of: str = ""
) -> Iterator[Problem]:
    """Yield a problem for each fact, and each part of one, that is not as it was."""
    for name in dict.fromkeys((*before, *now)):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, where, f"{name} ")
        elif old != new:
            yield Problem(
                f"the conversion that was killed is not this one: {of}{name} differs",
                where=where,
                expected=_shown(old),
                found=_shown(new),
                hint="continue it as it was started; --force without --resume begins anew",
            )


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    return printable(value if isinstance(value, str) else json.dumps(value), 300)


def _done(stated: dict[str, Any]) -> Done | None:
    name, digest = stated.get("name"), stated.get("sha256")
    if not isinstance(name, str) or not isinstance(digest, str):
        return None
    try:
        found = tuple(
            Nonfinite(str(tensor), tuple(map(int, index)), str(value))
            for tensor, index, value in stated.get("found", ())
        )
        zeros = tuple(map(str, stated.get("zeros", ())))
        return Done(name, digest, int(stated.get("nonfinite", 0)), found, zeros)
    except (TypeError, ValueError):
        return None


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


BLOCK_BYTES = 1 << 20
"""The block size of evaluation: a block should still be in a core's cache when it is hashed."""

KEPT_BYTES = 64 << 20
"""The most bytes that a thread keeps of one expert, of which copies stand one after the other."""

Progress = Callable[[int, int], None]
"""Receives the bytes written so far and the total bytes."""


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write.

    Attributes:
      name: its name in the checkpoint.
      expr: its expression; the order of its axes is that on disk.
      dtype: its element type on disk; of blocks, that of the elements they are made from.
      storage: the blocks that it is quantised to, if any.
    """

    name: str
    expr: Expr
    dtype: DType
    storage: Storage | None = None

    @property
    def entry(self) -> Entry:
        """Its name, type and shape."""
        return Entry(self.name, self.dtype, self.expr.type.shape, self.storage)


@dataclass(frozen=True)
class WrittenTensor:
    """A written tensor: name, type (``bf16``, ``q8_0``), file, and the SHA-256 of its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    sha256: str
    nbytes: int


@dataclass(frozen=True)
class WriteReport:
    """A report of the written files and tensors.

    Attributes:
      tensors: sorted by name, numbers compared as numbers.
      files: the size of each file in bytes, by its name, the index included.
      total_bytes: the bytes of all tensors.
      distinct_bytes: the bytes of the distinct tensors, which were evaluated and hashed.
      nonfinite: the source tensors that hold NaN or infinity.
      spread: a line for each distinct tensor that was written with NaN or infinity, which may be
        more than its sources had: the noise of a matrix is scaled by the spread of all of it.
      zeros: the matrices of the source that were read and hold nothing but zeros.
      kept_bytes: the bytes of tensors that an earlier run had completed.
    """

    tensors: tuple[WrittenTensor, ...]
    files: Mapping[str, int]
    total_bytes: int
    distinct_bytes: int
    nonfinite: tuple[Nonfinite, ...] = ()
    spread: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()
    kept_bytes: int = 0


def write_checkpoint(
    folder: Path,
    tensors: Sequence[OutputTensor],
    reader: Reader,
    *,
    max_shard_bytes: int = 5 * 10**9,
    metadata: Mapping[str, str] | None = None,
    threads: int = 2,
    progress: Progress | None = None,
    allow_nonfinite: bool = False,
    journal: Journal | None = None,
) -> WriteReport:
    """Write `tensors` into `folder`, and synchronise it to the disk.

    Args:
      folder: an existing folder without weights; after an error its content is undefined.
      tensors: the tensors to write, in any order.
      reader: reads the sources; called from several threads.
      max_shard_bytes: the limit of a file; a larger tensor gets a file of its own.
      metadata: additional header entries of each file, besides ``format``.
      threads: the number of expressions evaluated concurrently.
      progress: called after each block, from one thread at a time.
      allow_nonfinite: whether sources may hold NaN and infinity.
      journal: notes what is complete; what an earlier run completed, and is still so on the disk,
        is not written again.

    Raises:
      UsageError: an invalid limit.
      InputError: names that cannot be written; sources that are not finite, or values that
        overflow, all of them at once; a source that changed.
      MachineError: a write failed.
    """
    if max_shard_bytes < 1 or threads < 1:
        raise UsageError("max_shard_bytes and threads must be at least 1")
    entries = [t.entry for t in tensors]
    _refuse_names(entries)
    shards = plan_shards(entries, max_shard_bytes, {"format": "pt", **(metadata or {})})
    report = write_files(
        folder, tensors, shards, reader, threads=threads, progress=progress,
        allow_nonfinite=allow_nonfinite, journal=journal,
    )  # fmt: skip
    if len(shards) == 1:
        return report
    index = index_json(shards, report.total_bytes, sum(prod(e.shape) for e in entries))
    write_durable(folder / INDEX_NAME, index)
    return replace(report, files={**report.files, INDEX_NAME: len(index)})


def write_files(
    folder: Path,
    tensors: Sequence[OutputTensor],
    files: Sequence[Shard],
    reader: Reader,
    *,
    threads: int = 2,
    progress: Progress | None = None,
    allow_nonfinite: bool = False,
    journal: Journal | None = None,
) -> WriteReport:
    """Write `tensors` at the offsets of `files`, whatever their format, and synchronise them.

    Arguments and errors are those of `write_checkpoint`.
    """
    wanted = _checked(tensors)
    scan = ScanningReader(reader)
    offsets = {n: (folder / s.name, at) for s in files for n, at in s.offsets.items()}
    jobs = _jobs(tensors, wanted, offsets)
    entries = [t.entry for t in tensors]
    total = sum(e.nbytes for e in entries)
    with _created(folder, files, threads, journal is not None) as created:
        work = _Work(Evaluator(scan), scan, created, progress, total, allow_nonfinite, journal)
        work.run(jobs, threads)
        work.raise_problems()
    written = _written(entries, files, jobs)
    sizes = {s.name: s.size_bytes for s in files}
    return WriteReport(
        written, sizes, total, sum(job.nbytes for job in jobs), scan.found,
        spread=tuple(sorted(job.nonfinite_text() for job in jobs if job.nonfinite)),
        zeros=scan.zeros, kept_bytes=work.kept_bytes,
    )  # fmt: skip


def _refuse_names(entries: Sequence[Entry]) -> None:
    """Raise InputError if names cannot be written, before they are laid out in files."""
    problems = Problems()
    names: set[str] = set()
    for name in (entry.name for entry in entries):
        fault = name_fault(name) or ("two tensors of one name" * (name in names))
        if name == "__metadata__":
            fault = "the name belongs to the format"
        if fault:
            problems.add(fault, where=f"output tensor {quoted(name)}")
        names.add(name)
    problems.raise_if_any()


def _checked(tensors: Sequence[OutputTensor]) -> list[Expr]:
    """Return the expressions to evaluate, simplified. Raises InputError with all problems."""
    problems = Problems()
    made: list[Expr] = []
    for tensor in tensors:
        try:
            made.append(simplify(Cast(tensor.expr, tensor.dtype)))
        except InputError as error:
            problems.extend(error.problems)
    problems.raise_if_any()
    return made


@dataclass(eq=False)
class _Job:
    """A distinct expression, the files and offsets of its copies, and finally their digest."""

    expr: Expr
    storage: Storage | None = None
    names: list[str] = field(default_factory=list)
    places: list[tuple[Path, int]] = field(default_factory=list)
    sha256: str = ""
    nonfinite: int = 0

    def nonfinite_text(self) -> str:
        """Say how many elements of the tensor are not finite."""
        others = f" and {len(self.names) - 1} more" if len(self.names) > 1 else ""
        size = prod(self.expr.type.shape)
        return f"{self.names[0]}{others}: {self.nonfinite:,} of {size:,} elements"

    @property
    def nbytes(self) -> int:
        return Entry("", self.expr.type.dtype, self.expr.type.shape, self.storage).nbytes


def _jobs(
    tensors: Sequence[OutputTensor], wanted: list[Expr], offsets: Mapping[str, tuple[Path, int]]
) -> list[_Job]:
    """Group the tensors by the expression of their bytes; the largest first, to end together."""
    jobs: dict[tuple[Expr, Storage | None], _Job] = {}
    for tensor, expr in zip(tensors, wanted, strict=True):
        key = same_bytes(expr)
        job = jobs.setdefault((key, tensor.storage), _Job(key, tensor.storage))
        job.names.append(tensor.name)
        job.places.append(offsets[tensor.name])
    for job in jobs.values():
        job.places.sort()
    return sorted(jobs.values(), key=lambda job: -job.nbytes)


class _Work:
    """Evaluates, hashes and writes jobs; after a problem it continues without writing."""

    def __init__(
        self,
        evaluator: Evaluator,
        scan: ScanningReader,
        files: OutputFiles,
        progress: Progress | None,
        total_bytes: int,
        allow_nonfinite: bool,
        journal: Journal | None,
    ) -> None:
        self._evaluator = evaluator
        self._scan = scan
        self._files = files
        self._progress = progress
        self._total_bytes = total_bytes
        self._allow_nonfinite = allow_nonfinite
        self._journal = journal
        self.kept_bytes = 0
        self._done_bytes = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._problems = Problems()

    def run(self, jobs: Sequence[_Job], threads: int) -> None:
        """Run all jobs; an exception in one ends the others."""
        with ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(self._job, job) for job in jobs]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    def raise_problems(self) -> None:
        """Raise InputError with all problems of the values."""
        if not self._allow_nonfinite:
            self._problems.extend(found.problem() for found in self._scan.found)
        self._problems.raise_if_any()

    def _job(self, job: _Job) -> None:
        if not self._is_complete(job):
            self._make(job)

    def _is_complete(self, job: _Job) -> bool:
        """Whether an earlier run made it, and the disk still has it."""
        done = None if self._journal is None else self._journal.known.get(job.names[0])
        if done is None or not all(
            has_digest(path, at, job.nbytes, done.sha256) for path, at in job.places
        ):
            return False
        job.sha256, job.nonfinite = done.sha256, done.nonfinite
        read = (s.name for s in sources(job.expr) if len(s.type.shape) > 1)
        self._scan.recall(read, done.found, set(done.zeros))
        with self._lock:
            self.kept_bytes += job.nbytes * len(job.places)
        self._report(job.nbytes * len(job.places))
        return True

    def _note(self, job: _Job) -> None:
        if self._journal is None or self._failed or self._stop.is_set():
            return
        names = {source.name for source in sources(job.expr)}
        found = tuple(one for one in self._scan.found if one.tensor in names)
        zeros = tuple(name for name in self._scan.zeros if name in names)
        self._journal.note(Done(job.names[0], job.sha256, job.nonfinite, found, zeros))

    def _make(self, job: _Job) -> None:
        digest = hashlib.sha256()
        offset = 0
        try:
            for block in self._blocks(job):
                if not self._failed:
                    digest.update(block)
                    for path, at in job.places:
                        self._files.write(path, block, at + offset)
                offset += len(block)
                self._report(len(block) * len(job.places))
        except ValuesOverflow as error:
            self._note_overflow(job, error)
            return
        job.sha256 = digest.hexdigest()
        self._note(job)

    def _blocks(self, job: _Job) -> Iterator[memoryview]:
        """Yield the bytes of a job; copies along the first axis are made once, if they fit."""
        expr = job.expr
        if isinstance(expr, Tile) and expr.position == 0 and _size(expr.x) <= KEPT_BYTES:
            made = list(self._encoded(expr.x, job))
            job.nonfinite *= expr.size
            yield from (block for _ in range(expr.size) for block in made)
        else:
            yield from self._encoded(expr, job)

    def _encoded(self, expr: Expr, job: _Job) -> Iterator[memoryview]:
        storage = job.storage
        for box in row_blocks(expr.type, BLOCK_BYTES):
            if self._stop.is_set():
                return
            values = self._evaluator.block(expr, box)
            if self._allow_nonfinite and first_nonfinite(values) is not None:
                job.nonfinite += int(np.count_nonzero(~np.isfinite(values)))
            if values.size:
                yield _bytes(values if storage is None else quantise(values, storage))

    @property
    def _failed(self) -> bool:
        return bool(self._problems) or (not self._allow_nonfinite and bool(self._scan.found))

    def _report(self, nbytes: int) -> None:
        if self._progress is None:
            return
        with self._lock:
            self._done_bytes += nbytes
            self._progress(self._done_bytes, self._total_bytes)

    def _note_overflow(self, job: _Job, error: ValuesOverflow) -> None:
        problem = error.problems[0]
        others = f" and {len(job.names) - 1} more" if len(job.names) > 1 else ""
        with self._lock:
            self._problems.add(
                problem.what,
                where=f"output tensor {quoted(job.names[0])}{others}",
                found=problem.found,
                hint=problem.hint,
            )
        for source in sources(job.expr):
            for box in row_blocks(source.type, BLOCK_BYTES):
                self._evaluator.block(source, box)


def _size(expr: Expr) -> int:
    return prod(expr.type.shape) * expr.type.dtype.itemsize_bytes


def _bytes(values: Array) -> memoryview:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


@contextmanager
def _created(
    folder: Path, shards: Sequence[Shard], threads: int, keep: bool
) -> Iterator[OutputFiles]:
    """Create the files with their headers; synchronise them unless there is an exception.

    With `keep` the content of existing files stays, and all other files are removed.
    """
    files = OutputFiles()
    try:
        if keep:
            remove_but(folder, {JOURNAL_NAME, *(shard.name for shard in shards)})
        for shard in shards:
            files.create(folder / shard.name, shard.size_bytes, shard.header, keep=keep)
        yield files
        files.synchronise([folder / shard.name for shard in shards], threads)
    finally:
        files.close()


def _written(
    entries: Sequence[Entry], shards: Sequence[Shard], jobs: Sequence[_Job]
) -> tuple[WrittenTensor, ...]:
    digests = {name: job.sha256 for job in jobs for name in job.names}
    found = {name: shard.name for shard in shards for name in shard.offsets}
    return tuple(
        WrittenTensor(
            e.name,
            e.storage.name.lower() if e.storage else e.dtype.name,
            e.shape,
            found[e.name],
            digests[e.name],
            e.nbytes,
        )
        for e in sorted(entries, key=lambda e: natural(e.name))
    )
