"""Size and SHA-256 of files, by threads of their own, also beside other work."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from moecc.checkpoint.files import open_regular, read_into
from moecc.checkpoint.records import FileRecord

HASH_THREADS = 2
CHUNK_BYTES = 1 << 20
"""What is read at once: it should still be in the cache of the core when it is hashed."""

_local = threading.local()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a regular file, in hexadecimal, in constant memory.

    Raises:
      InputError: there is no such regular file.
      MachineError: it cannot be read.
    """
    return _file_record(path, threading.Event()).sha256


def file_records(files: Mapping[str, Path] | Iterable[Path]) -> dict[str, FileRecord]:
    """Return size and digest of files, by the given names or by file name; uses two threads.

    Raises: as `file_digest`.
    """
    with hashed_beside(files) as records:
        return records()


@contextmanager
def hashed_beside(
    files: Mapping[str, Path] | Iterable[Path],
) -> Iterator[Callable[[], dict[str, FileRecord]]]:
    """Begin to hash files; yield what waits for size and digest of each, by name.

    What is yielded raises as `file_digest`.  On the way out, hashing that nobody waits for ends.
    """
    named = dict(files) if isinstance(files, Mapping) else {path.name: path for path in files}
    stop = threading.Event()
    with ThreadPoolExecutor(HASH_THREADS) as threads:
        hashed = {name: threads.submit(_file_record, path, stop) for name, path in named.items()}
        try:
            yield lambda: {name: one.result() for name, one in hashed.items()}
        finally:
            stop.set()
            threads.shutdown(cancel_futures=True)


def chunk_buffer() -> memoryview:
    """Return this thread's own buffer of one chunk."""
    if not hasattr(_local, "buffer"):
        _local.buffer = memoryview(bytearray(CHUNK_BYTES))
    buffer: memoryview = _local.buffer
    return buffer


def range_digest(
    descriptor: int, end_bytes: int, path: Path, stop: threading.Event | None = None
) -> str:
    """Return the SHA-256 of the first bytes of a file. Raises CancelledError after `stop`."""
    digest = hashlib.sha256()
    buffer = chunk_buffer()
    for done in range(0, end_bytes, CHUNK_BYTES):
        if stop is not None and stop.is_set():
            raise CancelledError
        part = buffer[: min(CHUNK_BYTES, end_bytes - done)]
        read_into(descriptor, part, done, path)
        digest.update(part)
    return digest.hexdigest()


def _file_record(path: Path, stop: threading.Event) -> FileRecord:
    descriptor, identity = open_regular(path)
    try:
        digest = range_digest(descriptor, identity.size_bytes, path, stop)
        return FileRecord(identity.size_bytes, digest)
    finally:
        os.close(descriptor)
