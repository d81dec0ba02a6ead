"""Write files of an output and synchronise them to the disk, with a bounded number of them open.

An output is committed in this order: its files are synchronised, then its folders, then it is
renamed to its final name, then the folder of that name is synchronised.  After a loss of power
the final name is either absent or complete.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moecc.checkpoint.disk import CREATE, KEEP, disk
from moecc.checkpoint.files import OPEN_DESCRIPTORS, DescriptorPool, os_problem

RELEASED_BYTES = 32 << 20
"""After so many bytes, the system may begin to write a file and forget what is written.

Otherwise gigabytes wait in memory until the end, drive out what others keep there, and memory that
was never used is far slower to fill than memory that was just released.
"""

_AGAIN = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW


class OutputFiles:
    """Writes at offsets of many new files; thread-safe; a bounded number of them is open."""

    def __init__(self, limit: int = OPEN_DESCRIPTORS) -> None:
        self._pool = DescriptorPool(limit, _open_again)
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
        descriptor = _open(path, KEEP if keep else CREATE)
        try:
            disk().truncate(descriptor, size_bytes)
            _write_all(descriptor, memoryview(head), 0)
        except OSError as error:
            raise os_problem(error, path, "write") from None
        finally:
            os.close(descriptor)

    def write(self, path: Path, data: memoryview, offset: int) -> None:
        """Write at an offset of a file that was created. Raises MachineError."""
        with self._pool.lease(path) as descriptor:
            try:
                _write_all(descriptor, data, offset)
                if self._is_due(path, len(data)):
                    disk().release(descriptor)
            except OSError as error:
                raise os_problem(error, path, "write") from None

    def synchronise(self, paths: Sequence[Path], threads: int) -> None:
        """Return once the files are on the disk. Raises MachineError."""
        # A file that was closed and opened again still reports what failed in between.
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(self._flush, paths))

    def close(self) -> None:
        """Close all files."""
        self._pool.close()

    def _is_due(self, path: Path, nbytes: int) -> bool:
        """Count what is written of a file; return whether it is time to release it."""
        with self._lock:
            self._waiting_bytes[path] += nbytes
            is_due = self._waiting_bytes[path] >= RELEASED_BYTES
            if is_due:
                del self._waiting_bytes[path]
            return is_due

    def _flush(self, path: Path) -> None:
        with self._pool.lease(path) as descriptor:
            _flush(descriptor, path)


def write_durable(path: Path, content: bytes) -> None:
    """Write a new file and synchronise it to the disk.

    Raises:
      MachineError: the disk is full, or there is such a file.
    """
    descriptor = _open(path, CREATE)
    try:
        _write_all(descriptor, memoryview(content), 0)
        _flush(descriptor, path)
    except OSError as error:
        raise os_problem(error, path, "write") from None
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder unless it is there. Raises MachineError."""
    if path.is_dir():
        return
    try:
        disk().mkdir(path)
    except OSError as error:
        raise os_problem(error, path, "make") from None


def synchronise_folder(folder: Path) -> None:
    """Make the names in a folder durable. Raises MachineError."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise os_problem(error, folder, "synchronise") from None
    try:
        _flush(descriptor, folder)
    finally:
        os.close(descriptor)


def _open_again(path: Path) -> int:
    return _open(path, _AGAIN)


def _open(path: Path, flags: int) -> int:
    try:
        return disk().open(path, flags)
    except OSError as error:
        raise os_problem(error, path, "write") from None


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        done = disk().write(descriptor, data, offset)
        data, offset = data[done:], offset + done


def _flush(descriptor: int, path: Path) -> None:
    try:
        disk().sync(descriptor)
    except OSError as error:
        raise os_problem(error, path, "synchronise") from None
