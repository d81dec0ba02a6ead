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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TypeVar

from moecc.errors import (
    InputError,
    Problem,
    Problems,
    UsageError,
    printable,
    quoted,
    raise_problems,
)
from moecc.formats.files import (
    CREATE,
    OPEN_DESCRIPTORS,
    DescriptorPool,
    disk,
    has_digest,
    os_errors,
    read_bounded,
    remove_but,
    synchronise,
    write_all,
    write_durable,
)
from moecc.formats.gguf.storage import Storage, quantise
from moecc.formats.manifest import FileRecord, TensorRecord
from moecc.formats.safetensors import (
    INDEX_NAME,
    ConversionPart,
    Entry,
    Shard,
    index_json,
    natural,
    shards_of,
)
from moecc.support.documents import parse_json_object
from moecc.support.lazy import np
from moecc.support.process import Closing
from moecc.support.record import read_record, stored, to_json
from moecc.support.untyped import Json, JsonDict
from moecc.types import Array, DType
from moecc.weights.arithmetic import Cast, first_nonfinite
from moecc.weights.evaluate import Evaluator, TensorReader, ValuesOverflow, same_bytes
from moecc.weights.expr import Expr, row_blocks, sources
from moecc.weights.movement import Tile
from moecc.weights.simplify import simplify

T = TypeVar("T")

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

    def __init__(self, reader: TensorReader) -> None:
        self._reader = reader
        self._lock = threading.Lock()
        self._scanned: set[tuple[str, int, int | None]] = set()
        self._nonfinite: dict[str, Nonfinite] = {}
        self._is_zero: dict[str, bool] = {}

    @property
    def nonfinite(self) -> tuple[Nonfinite, ...]:
        """The tensors with such values so far, sorted by name."""
        with self._lock:
            return tuple(self._nonfinite[name] for name in sorted(self._nonfinite))

    @property
    def zeros(self) -> tuple[str, ...]:
        """The matrices of which nothing but zeros was read, sorted by name."""
        with self._lock:
            return tuple(sorted(name for name, is_zero in self._is_zero.items() if is_zero))

    def recall(self, names: Iterable[str], nonfinite: Iterable[Nonfinite], zeros: Set[str]) -> None:
        """Add what an earlier run noted of the tensors that it read."""
        for note in nonfinite:
            self._add(note)
        for name in names:
            self._note_zero(name, name in zeros)

    def __call__(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows [start, stop) of a tensor."""
        values = self._reader(name, start, stop)
        with self._lock:
            is_scanned = (name, start, stop) in self._scanned
            self._scanned.add((name, start, stop))
        if not is_scanned:
            position = first_nonfinite(values)
            if position is not None:
                element = np.unravel_index(position, values.shape)
                index = tuple(int(i) for i in element)
                index = (index[0] + start, *index[1:]) if index else index
                self._add(Nonfinite(name, index, str(float(values[element]))))
            if values.ndim > 1:
                raw = _bytes_of(values)
                # Of most tensors the first few bytes are not all zero.
                self._note_zero(name, not any(raw[:64]) and not np.any(raw))
        return values

    def _note_zero(self, name: str, is_zero: bool) -> None:
        with self._lock:
            self._is_zero[name] = is_zero and self._is_zero.get(name, True)

    def _add(self, note: Nonfinite) -> None:
        """Keep the first element of each tensor; indices are in the order of the elements."""
        with self._lock:
            first = self._nonfinite.get(note.tensor)
            if first is None or note.index < first.index:
                self._nonfinite[note.tensor] = note


# The journal: what a conversion has written so far, in its temporary folder.
#
# The first line states what decides the result; then comes a line for each tensor that is
# complete, with its digest.  Nothing in it is trusted: what is on the disk is hashed again before
# it is kept, so lines need not reach the disk in order, and a torn last line does no harm.

JOURNAL_NAME = "moecc_journal.jsonl"
COMMIT_NAME = "moecc_commit.jsonl"
"""The name of the journal while a file and its manifest are put in place."""
SCHEMA = "moecc.journal/2"
MAX_JOURNAL_BYTES = 1 << 30
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK

Facts = Json
"""The facts that decide the result of a conversion, by name."""


@dataclass(frozen=True)
class _JournalHead:
    facts: Facts
    schema: str = SCHEMA


@dataclass(frozen=True)
class Done:
    """A tensor that is complete, with its copies: a line of the journal.

    Attributes:
      name: the name of the first copy.
      sha256: the digest of its bytes.
      nonfinite_count: how many of its elements are not finite.
      nonfinite: the tensors of the source with NaN or infinity that it was made from.
      zeros: the matrices of the source without anything but zeros that it was made from.
    """

    name: str
    sha256: str
    nonfinite_count: int = field(default=0, metadata=stored(omit_default=True))
    nonfinite: tuple[Nonfinite, ...] = field(default=(), metadata=stored(omit_default=True))
    zeros: tuple[str, ...] = field(default=(), metadata=stored(omit_default=True))


class OutputJournal(Closing):
    """The journal of one output; thread-safe.

    Attributes:
      completed: the tensors that an earlier run completed, by the name of the first copy.
    """

    def __init__(self, folder: Path, facts: Facts, completed: Mapping[str, Done]) -> None:
        self.completed = completed
        self._path = folder / JOURNAL_NAME
        self._lock = threading.Lock()
        # After a torn line, a new one begins.
        head = b"\n" if completed else _json_line(to_json(_JournalHead(facts)))
        with os_errors(self._path, "write"):
            self._descriptor = disk().open(self._path, _APPEND)
            disk().append(self._descriptor, head)

    def note(self, done: Done) -> None:
        """Append a line. Raises MachineError."""
        with os_errors(self._path, "write"), self._lock:
            disk().append(self._descriptor, _json_line(to_json(done)))

    def synchronise(self) -> None:
        """Return once it is on the disk. Raises MachineError."""
        synchronise(self._descriptor, self._path)

    def close(self) -> None:
        """Close the file, which stays."""
        os.close(self._descriptor)

    def remove(self) -> None:
        """Remove the file: the output is complete. Raises MachineError."""
        with os_errors(self._path, "remove"):
            disk().unlink(self._path)


def _json_line(document: JsonDict) -> bytes:
    return f"{json.dumps(document, sort_keys=True)}\n".encode()


def has_journal(folder: Path) -> bool:
    """Return whether a partial output can be continued, if by anything."""
    return _journal_of(folder).is_file()


def _journal_of(folder: Path) -> Path:
    journal, commit = folder / JOURNAL_NAME, folder / COMMIT_NAME
    return commit if commit.is_file() and not journal.is_file() else journal


def read_journal(
    folder: Path,
    facts: Facts,
    fault: str = "the conversion that was killed is not this one",
    hint: str = "continue it as it was started; --force without --resume begins anew",
) -> dict[str, Done]:
    """Return the tensors that an earlier run of the same conversion completed, by name.

    There are none if it left no journal, or one of another version of moecc.

    Args:
      folder: the folder of the journal.
      facts: the facts of this conversion.
      fault: the problem of a journal with other facts.
      hint: the way out of it.

    Raises:
      InputError: the earlier run was another conversion; all differences.
      MachineError: the file cannot be read.
    """
    if not has_journal(folder):
        return {}
    lines = read_bounded(_journal_of(folder), MAX_JOURNAL_BYTES).split(b"\n")
    head = _read_line(_JournalHead, lines[0])
    if head is None:
        return {}
    differences = _differences(head.facts, json.loads(json.dumps(facts)))
    raise_problems(
        Problem(f"{fault}: {name} differs", str(folder), _fact_text(old), _fact_text(new), hint)
        for name, old, new in differences
    )
    # The last line is torn, or empty.
    notes = (_read_line(Done, line) for line in lines[1:-1])
    return {done.name: done for done in notes if done is not None}


def _read_line(cls: Callable[..., T], line: bytes) -> T | None:
    """Return a line of the journal, or None if it is torn."""
    try:
        return read_record(cls, parse_json_object(line, ""), "")
    except InputError:
        return None


def _differences(
    before: Json, now: Json, section: str = ""
) -> Iterator[tuple[str, object, object]]:
    """Yield name, old and new value of each fact, and of each part of one, that differs."""
    for name in dict.fromkeys((*before, *now)):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{name} ")
        elif old != new:
            yield f"{section}{name}", old, new


def _fact_text(value: object) -> str:
    if value is None:
        return "nothing"
    return printable(value if isinstance(value, str) else json.dumps(value), 300)


# The files of an output while they are written, of which a bounded number is open.

RELEASED_BYTES = 32 << 20
"""After so many bytes, the system may begin to write a file and forget what is written.

Otherwise gigabytes wait in memory until the end, drive out what others keep there, and memory that
was never used is far slower to fill than memory that was just released.
"""

_KEEP = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
_AGAIN = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW


class OutputFiles:
    """Writes at offsets of many new files; thread-safe; a bounded number of them is open."""

    def __init__(self) -> None:
        self._pool = DescriptorPool(OPEN_DESCRIPTORS, lambda path: _open(path, _AGAIN))
        self._lock = threading.Lock()
        self._waiting_bytes: Counter[Path] = Counter()

    def create(self, path: Path, size_bytes: int, head: bytes, *, keep: bool = False) -> None:
        """Create a file of its full size that begins with `head`.

        Args:
          path: the file.
          size_bytes: its size.
          head: its first bytes.
          keep: whether the content of an existing file stays.

        Raises:
          MachineError: the disk is full, or there is such a file.
        """
        descriptor = _open(path, _KEEP if keep else CREATE)
        try:
            with os_errors(path, "write"):
                disk().truncate(descriptor, size_bytes)
                write_all(descriptor, memoryview(head), 0)
        finally:
            os.close(descriptor)

    def write(self, path: Path, data: memoryview, offset: int) -> None:
        """Write at an offset of a file that was created. Raises MachineError."""
        with self._pool.lease(path) as descriptor, os_errors(path, "write"):
            write_all(descriptor, data, offset)
            with self._lock:
                self._waiting_bytes[path] += len(data)
                is_due = self._waiting_bytes[path] >= RELEASED_BYTES
                if is_due:
                    del self._waiting_bytes[path]
            if is_due:
                disk().release(descriptor)

    def synchronise(self, paths: Sequence[Path], threads: int) -> None:
        """Return once the files are on the disk. Raises MachineError."""
        # A file that was closed and opened again still reports what failed in between.
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(self._synchronise, paths))

    def close(self) -> None:
        """Close all files."""
        self._pool.close()

    def _synchronise(self, path: Path) -> None:
        with self._pool.lease(path) as descriptor:
            synchronise(descriptor, path)


def _open(path: Path, flags: int) -> int:
    with os_errors(path, "write"):
        return disk().open(path, flags)


# Write the tensors.

BLOCK_BYTES = 1 << 20
"""The block size of evaluation: a block should still be in a core's cache when it is hashed."""

MAX_COPIED_BYTES = 64 << 20
"""The most bytes that a thread holds of one expert, of which copies stand one after the other."""

Progress = Callable[[int, int], None]
"""Receives the bytes written so far and the total bytes."""


MAX_SHARD_BYTES = 5 * 10**9
"""The default limit of a shard."""


@dataclass(frozen=True)
class WriteOptions:
    """Options for writing weights.

    Attributes:
      max_shard_bytes: the limit of a shard; a larger tensor gets a shard of its own.
      allow_nonfinite: whether sources may hold NaN and infinity.
      verify: whether a conversion runs source and result, and compares them.
      progress: receives the bytes written so far, and all, from one thread at a time.
      journal: notes complete tensors; those that an earlier run completed, and that are still so
        on the disk, are not written again.
      threads: the number of expressions evaluated concurrently.
      part: the part of the shards to write; None for all, and their index.
      is_join: whether parts wrote all tensors: one that the journal or the disk does not have is a
        problem, and is not written.
      source_files: waits for the digests of the source's files, and returns them.
      proof: the files of a proof that are copied beside the weights, its log first.
    """

    max_shard_bytes: int = MAX_SHARD_BYTES
    allow_nonfinite: bool = False
    verify: bool = False
    progress: Progress | None = None
    journal: OutputJournal | None = None
    threads: int = 2
    part: ConversionPart | None = None
    is_join: bool = False
    source_files: Callable[[], Mapping[str, FileRecord]] = dict
    proof: tuple[Path, ...] = ()

    @property
    def words(self) -> list[str]:
        """The options of the command that decide the content of the files."""
        shards = self.max_shard_bytes != MAX_SHARD_BYTES
        nonfinite = ["--allow-nonfinite"] if self.allow_nonfinite else []
        proof = [f"--proof OUT/{path.name}" for path in self.proof[:1]]
        return [f"--max-shard-bytes {self.max_shard_bytes}"] * shards + nonfinite + proof


DEFAULTS = WriteOptions()


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
    def type_name(self) -> str:
        """The name of its element type on disk, or of its blocks."""
        return self.storage.name.lower() if self.storage else self.dtype.name

    @property
    def entry(self) -> Entry:
        """Its name, type and shape."""
        return Entry(self.name, self.dtype, self.expr.type.shape, self.storage)


@dataclass(frozen=True)
class WriteReport:
    """A report of the written files and tensors.

    Attributes:
      tensors: their records by name, sorted, numbers compared as numbers.
      total_bytes: the bytes of all tensors.
      nonfinite: the source tensors that hold NaN or infinity.
      spread: a line for each distinct tensor that was written with NaN or infinity, which may be
        more than its sources had: the noise of a matrix is scaled by the spread of all of it.
      zeros: the matrices of the source that were read and hold nothing but zeros.
      resumed_bytes: the bytes of tensors that an earlier run had completed.
    """

    tensors: Mapping[str, TensorRecord]
    total_bytes: int
    nonfinite: tuple[Nonfinite, ...]
    spread: tuple[str, ...]
    zeros: tuple[str, ...]
    resumed_bytes: int


def write_checkpoint(
    folder: Path,
    tensors: Sequence[OutputTensor],
    reader: TensorReader,
    options: WriteOptions = DEFAULTS,
    *,
    metadata: Mapping[str, str] | None = None,
) -> WriteReport:
    """Write `tensors` into `folder`, and synchronise it to the disk.

    Args:
      folder: an existing folder without weights; after an error its content is undefined.
      tensors: the tensors to write, in any order.
      reader: reads the sources; called from several threads.
      options: limits, threads and what is accepted.
      metadata: additional header entries of each file, besides ``format``.

    Raises:
      UsageError: an invalid limit.
      InputError: names that cannot be written; sources that are not finite, or values that
        overflow, all of them at once; a source that changed.
      MachineError: a write failed.
    """
    if options.threads < 1:
        raise UsageError("threads must be at least 1")
    entries = [t.entry for t in tensors]
    shards = shards_of(entries, options.max_shard_bytes, metadata or {}, options.part)
    report = write_files(folder, tensors, shards, reader, options)
    if len(shards) > 1 and options.part is None:
        index = index_json(shards, report.total_bytes, sum(prod(e.shape) for e in entries))
        write_durable(folder / INDEX_NAME, index)
    return report


def write_files(
    folder: Path,
    tensors: Sequence[OutputTensor],
    files: Sequence[Shard],
    reader: TensorReader,
    options: WriteOptions,
) -> WriteReport:
    """Write `tensors` at the offsets of `files`, whatever their format, and synchronise them.

    Arguments and errors are those of `write_checkpoint`.
    """
    problems = Problems()
    exprs: list[Expr] = []
    for tensor in tensors:
        with problems:
            exprs.append(simplify(Cast(tensor.expr, tensor.dtype)))
    problems.raise_if_any()
    scan = ScanningReader(reader)
    offsets = {n: (folder / s.name, start) for s in files for n, start in s.offsets.items()}
    jobs = _jobs(tensors, exprs, offsets)
    entries = [t.entry for t in tensors if t.name in offsets]
    total_bytes = sum(e.nbytes for e in entries)
    outputs = OutputFiles()
    try:
        keep = options.journal is not None
        if keep:
            remove_but(folder, {JOURNAL_NAME, *(shard.name for shard in files)})
        for shard in files:
            outputs.create(folder / shard.name, shard.size_bytes, shard.header, keep=keep)
        work = _Work(scan, outputs, total_bytes, options)
        work.run(jobs)
        outputs.synchronise([folder / shard.name for shard in files], options.threads)
    finally:
        outputs.close()
    digests = {name: job.sha256 for job in jobs for name in job.names}
    records = {
        e.name: TensorRecord(
            digests[e.name],
            e.storage.name.lower() if e.storage else e.dtype.name,
            e.shape,
            offsets[e.name][0].name,
        )
        for e in sorted(entries, key=lambda e: natural(e.name))
    }
    spread = [
        f"{job.names[0]}{job.more_text}: {job.nonfinite_count:,} of "
        f"{prod(job.expr.type.shape):,} elements"
        for job in jobs
        if job.nonfinite_count
    ]
    return WriteReport(
        records,
        total_bytes,
        scan.nonfinite,
        tuple(sorted(spread)),
        scan.zeros,
        work.resumed_bytes,
    )


@dataclass(eq=False)
class _Job:
    """A distinct expression, the files and offsets of its copies, and finally their digest."""

    expr: Expr
    storage: Storage | None
    names: list[str] = field(default_factory=list)
    targets: list[tuple[Path, int]] = field(default_factory=list)
    sha256: str = ""
    nonfinite_count: int = 0

    @property
    def more_text(self) -> str:
        """The number of names besides the first, in words."""
        return f" and {len(self.names) - 1} more" if len(self.names) > 1 else ""

    @property
    def nbytes(self) -> int:
        return Entry("", self.expr.type.dtype, self.expr.type.shape, self.storage).nbytes


def _jobs(
    tensors: Sequence[OutputTensor], exprs: list[Expr], offsets: Mapping[str, tuple[Path, int]]
) -> list[_Job]:
    """Group the tensors by the expression of their bytes; the largest first, to end together.

    Expressions without a tensor in `offsets` are left out; the others have all their names.
    """
    jobs: dict[tuple[Expr, Storage | None], _Job] = {}
    for tensor, expr in zip(tensors, exprs, strict=True):
        key = same_bytes(expr)
        job = jobs.setdefault((key, tensor.storage), _Job(key, tensor.storage))
        job.names.append(tensor.name)
        if tensor.name in offsets:
            job.targets.append(offsets[tensor.name])
    for job in jobs.values():
        job.targets.sort()
    return sorted((j for j in jobs.values() if j.targets), key=lambda job: -job.nbytes)


class _Work:
    """Evaluates, hashes and writes jobs; after a problem it continues without writing."""

    def __init__(
        self, scan: ScanningReader, files: OutputFiles, total_bytes: int, options: WriteOptions
    ) -> None:
        self._evaluator = Evaluator(scan)
        self._scan, self._files, self._total_bytes = scan, files, total_bytes
        self._options, self._progress = options, options.progress
        self._journal, self._allow_nonfinite = options.journal, options.allow_nonfinite
        self.resumed_bytes = 0
        self._done_bytes = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._problems = Problems()

    def run(self, jobs: Sequence[_Job]) -> None:
        """Run all jobs; an exception in one ends the others.

        Raises:
          InputError: all problems of the values.
        """
        with ThreadPoolExecutor(self._options.threads) as pool:
            futures = [pool.submit(self._run_job, job) for job in jobs]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        if not self._allow_nonfinite:
            self._problems.extend(note.problem() for note in self._scan.nonfinite)
        self._problems.raise_if_any()

    def _run_job(self, job: _Job) -> None:
        if self._is_complete(job):
            return
        if not self._options.is_join:
            self._write_job(job)
            return
        with self._lock:
            self._problems.add(
                "a tensor is not the one that its part wrote",
                where=f"output tensor {quoted(job.names[0])}{job.more_text}",
                found=f"other bytes in {', '.join({path.name: 0 for path, _ in job.targets})}",
                hint="write the part again, with --force",
            )

    def _write_job(self, job: _Job) -> None:
        digest = hashlib.sha256()
        offset = 0
        try:
            for block in self._blocks(job):
                if not self._has_failed:
                    digest.update(block)
                    for path, start in job.targets:
                        self._files.write(path, block, start + offset)
                offset += len(block)
                self._report(len(block) * len(job.targets))
        except ValuesOverflow as error:
            self._note_overflow(job, error)
            return
        job.sha256 = digest.hexdigest()
        if self._journal is not None and not self._has_failed and not self._stop.is_set():
            names = {source.name for source in sources(job.expr)}
            nonfinite = tuple(note for note in self._scan.nonfinite if note.tensor in names)
            zeros = tuple(name for name in self._scan.zeros if name in names)
            done = Done(job.names[0], job.sha256, job.nonfinite_count, nonfinite, zeros)
            self._journal.note(done)

    def _is_complete(self, job: _Job) -> bool:
        """Whether an earlier run made it, and the disk still has it."""
        done = None if self._journal is None else self._journal.completed.get(job.names[0])
        if done is None or not all(
            has_digest(path, start, job.nbytes, done.sha256) for path, start in job.targets
        ):
            return False
        job.sha256, job.nonfinite_count = done.sha256, done.nonfinite_count
        matrices = (s.name for s in sources(job.expr) if len(s.type.shape) > 1)
        self._scan.recall(matrices, done.nonfinite, set(done.zeros))
        with self._lock:
            self.resumed_bytes += job.nbytes * len(job.targets)
        self._report(job.nbytes * len(job.targets))
        return True

    def _blocks(self, job: _Job) -> Iterator[memoryview]:
        """Yield the bytes of a job; copies along the first axis are made once, if they fit."""
        expr = job.expr
        if isinstance(expr, Tile) and expr.position == 0:
            size_bytes = prod(expr.x.type.shape) * expr.x.type.dtype.itemsize_bytes
            if size_bytes <= MAX_COPIED_BYTES:
                blocks = list(self._encoded(expr.x, job))
                job.nonfinite_count *= expr.size
                yield from (block for _ in range(expr.size) for block in blocks)
                return
        yield from self._encoded(expr, job)

    def _encoded(self, expr: Expr, job: _Job) -> Iterator[memoryview]:
        for box in row_blocks(expr.type, BLOCK_BYTES):
            if self._stop.is_set():
                return
            values = self._evaluator.block(expr, box)
            if self._allow_nonfinite and first_nonfinite(values) is not None:
                job.nonfinite_count += int(np.count_nonzero(~np.isfinite(values)))
            if values.size:
                yield _bytes_of(values if job.storage is None else quantise(values, job.storage))

    @property
    def _has_failed(self) -> bool:
        return bool(self._problems) or (not self._allow_nonfinite and bool(self._scan.nonfinite))

    def _report(self, nbytes: int) -> None:
        if self._progress is None:
            return
        with self._lock:
            self._done_bytes += nbytes
            self._progress(self._done_bytes, self._total_bytes)

    def _note_overflow(self, job: _Job, error: ValuesOverflow) -> None:
        problem = error.problems[0]
        where = f"output tensor {quoted(job.names[0])}{job.more_text}"
        with self._lock:
            self._problems.extend([replace(problem, where=where)])
        # The sources are scanned to the end, so that all their values that are not finite are
        # reported at once.
        for source in sources(job.expr):
            for box in row_blocks(source.type, BLOCK_BYTES):
                self._evaluator.block(source, box)


def _bytes_of(values: Array) -> memoryview:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
