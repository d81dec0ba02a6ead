"""The calls that change what is on the disk, all of them in one place.

Outputs call nothing else to write, synchronise, rename and delete, so that a test can count the
calls and end the process at any of them, or forget what was not synchronised.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
KEEP = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class Disk:
    """The system's calls; each raises OSError as the system does."""

    def open(self, path: Path, flags: int) -> int:
        """Open a file for writing, perhaps create it, and return a descriptor."""
        return os.open(path, flags, 0o666)

    def truncate(self, descriptor: int, size_bytes: int) -> None:
        """Set the size of a file."""
        os.ftruncate(descriptor, size_bytes)

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        """Write at an offset; return how many bytes were written."""
        return os.pwrite(descriptor, data, offset)

    def append(self, descriptor: int, data: bytes) -> None:
        """Write at the end of a file that was opened to append."""
        os.write(descriptor, data)

    def release(self, descriptor: int) -> None:
        """Begin to bring what was written to the disk; what is there need not stay in memory.

        Promises nothing about what is on the disk.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        with suppress(OSError):  # it is an advice
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def sync(self, descriptor: int) -> None:
        """Return once a file, or the names in a folder, are on the disk."""
        os.fsync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file or folder another name; an empty folder of that name is replaced."""
        os.rename(source, target)

    def replace(self, source: Path, target: Path) -> None:
        """Give a file another name, which another file may have."""
        os.replace(source, target)

    def mkdir(self, path: Path, mode: int = 0o777) -> None:
        """Make a folder."""
        os.mkdir(path, mode)

    def chmod(self, path: Path, mode: int) -> None:
        """Set the mode of a file or folder."""
        os.chmod(path, mode)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        os.unlink(path)

    def remove_tree(self, path: Path) -> None:
        """Remove a folder and what is in it, as far as possible; links are not followed."""
        # rmtree uses descriptors: a link created meanwhile is removed, never followed.
        shutil.rmtree(path, ignore_errors=True)


_disks: list[Disk] = [Disk()]


def disk() -> Disk:
    """Return the calls in force."""
    return _disks[-1]


@contextmanager
def injected(other: Disk) -> Iterator[Disk]:
    """Let all outputs use `other`, in all threads."""
    _disks.append(other)
    try:
        yield other
    finally:
        _disks.remove(other)
