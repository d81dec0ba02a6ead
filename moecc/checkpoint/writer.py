"""Write weight expressions as the tensors of files, in bounded memory.

Each distinct expression is read, evaluated and hashed once, a block at a time, and every block is
written at once to all its destinations.  Each thread takes one expression, so that reading and
hashing of one overlap with writing of another; offsets are fixed beforehand, so no byte
depends on the threads.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import numpy as np

from moecc.checkpoint.durable import OutputFiles, write_durable
from moecc.checkpoint.files import has_digest
from moecc.checkpoint.gguf.blocks import quantise
from moecc.checkpoint.gguf.storage import Storage
from moecc.checkpoint.journal import JOURNAL_NAME, Done, Journal
from moecc.checkpoint.layout import INDEX_NAME
from moecc.checkpoint.limits import name_fault
from moecc.checkpoint.nonfinite import Nonfinite, ScanningReader
from moecc.checkpoint.problems import Problems, quoted
from moecc.checkpoint.removal import remove_but
from moecc.checkpoint.shards import Entry, Shard, index_json, natural, plan_shards
from moecc.errors import InputError, UsageError
from moecc.types.arrays import Array
from moecc.types.dtypes import DType
from moecc.weights.arithmetic import Cast
from moecc.weights.boxes import row_blocks
from moecc.weights.evaluate import Evaluator, Reader, ValuesOverflow, same_bytes
from moecc.weights.expr import Expr, sources
from moecc.weights.movement import Tile
from moecc.weights.rounding import first_nonfinite
from moecc.weights.simplify import simplify

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
