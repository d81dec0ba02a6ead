"""The calls that change what is on the disk, all of them in one place.

Outputs call nothing else to write, synchronise, rename and delete, so that a test can count the
calls and end the process at any of them, or forget what was not synchronised.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moecc.errors import MachineError
from moecc.formats.files import os_errors

CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


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
def injected(calls: Disk) -> Iterator[Disk]:
    """Let all outputs use `calls`, in all threads."""
    _disks.append(calls)
    try:
        yield calls
    finally:
        _disks.remove(calls)


# What outputs are written with: files and names of folders that are on the disk on return.


def write_durable(path: Path, content: bytes) -> None:
    """Write a new file and synchronise it to the disk.

    Raises:
      MachineError: the disk is full, or there is such a file.
    """
    with os_errors(path, "write"):
        descriptor = disk().open(path, CREATE)
        try:
            write_all(descriptor, memoryview(content), 0)
            synchronise(descriptor, path)
        finally:
            os.close(descriptor)


def replace_durable(path: Path, content: bytes) -> None:
    """Write a file that takes the place of an older one at once. Raises MachineError."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    write_durable(partial, content)
    with os_errors(path, "rename"):
        disk().replace(partial, path)
    synchronise_folder(path.parent)


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write bytes at an offset. Raises OSError."""
    while data:
        count = disk().write(descriptor, data, offset)
        data, offset = data[count:], offset + count


def synchronise(descriptor: int, path: Path) -> None:
    """Return once an open file, or the names in a folder, are on the disk. Raises MachineError."""
    with os_errors(path, "synchronise"):
        disk().sync(descriptor)


def synchronise_folder(folder: Path) -> None:
    """Make the names in a folder durable. Raises MachineError."""
    with os_errors(folder, "synchronise"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        synchronise(descriptor, folder)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder unless it is there. Raises MachineError."""
    if not path.is_dir():
        with os_errors(path, "make"):
            disk().mkdir(path)


# Removal of what outputs made; links are not followed.


def remove(path: Path) -> None:
    """Remove a folder, or whatever has its name; errors are ignored, links are not followed."""
    # rmtree would open a pipe, and wait for someone to write to it.
    if os.path.islink(path) or not os.path.isdir(path):
        with suppress(OSError):
            disk().unlink(path)
        return
    try:
        disk().remove_tree(path)
    except BaseException:  # a second Ctrl-C: finish what the first one asked for
        disk().remove_tree(path)
        raise


def require_removed(path: Path, problem: str) -> None:
    """Remove a folder or file, or raise MachineError with `problem` if it is still there."""
    remove(path)
    if os.path.lexists(path):
        raise MachineError(problem, where=str(path), hint="delete it yourself")


def remove_but(folder: Path, names: Collection[str]) -> None:
    """Remove whatever is in a folder but the files with these names."""
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if name not in names or path.is_symlink() or not path.is_file():
            remove(path)
