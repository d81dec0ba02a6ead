"""The calls that change what is on the disk, all of them in one place.

Outputs call nothing else to write, synchronise, rename and delete, so that a test can count the
calls and end the process at any of them, or forget what was not synchronised.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from moecc.errors import InputError, MachineError, MoeccError
from moecc.formats.files import OPEN_DESCRIPTORS, DescriptorPool, os_problem

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


# Write files of an output and synchronise them to the disk, with a bounded number of them open.
#
# An output is committed in this order: its files are synchronised, then its folders, then it is
# renamed to its final name, then the folder of that name is synchronised.  After a loss of power
# the final name is either absent or complete.

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


# Removal of files and folders that outputs made, links never followed.

_BLOCK_BYTES = 512


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


def remove_rest(path: Path) -> None:
    """Remove what is of no use any more, now that the output is complete.

    Raises:
      MachineError: it cannot be removed.
    """
    remove(path)
    if os.path.lexists(path):
        raise MachineError(
            "the new output is complete, but this could not be deleted",
            where=str(path),
            hint="delete it yourself",
        )


def remove_but(folder: Path, kept: Collection[str]) -> None:
    """Remove whatever is in a folder but some files of it."""
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if name not in kept or path.is_symlink() or not path.is_file():
            remove(path)


def bytes_of(path: Path) -> int:
    """Return the disk space that the files in a folder take."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_blocks * _BLOCK_BYTES
    return total


# Folders that one process at a time fills: made or taken over, locked, and never left half-
# filled.
#
# A folder is emptied and removed only while its lock is held, so no writer removes what another
# one
# fills.  The system releases a lock with the process that holds it: what a killed one left is
# free.

BUSY = "another conversion is writing this output"
WAIT = "wait until it has finished"
_PRIVATE = 0o700


def is_locked(folder: Path) -> bool:
    """Return whether another process holds the lock of a folder."""
    try:
        descriptor = _open_folder(folder)
    except OSError:
        return False
    try:
        return not _lock(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def claimed(
    folder: Path, *, take_over: bool, goes_on: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """Yield a locked folder that only this user can enter; remove it on any exception.

    Args:
      folder: the folder, made unless it is there.
      take_over: whether to take what a killed process left there.
      goes_on: whether that is continued, called while the lock is held; otherwise it is removed.
        If it raises, everything stays as it is.

    Raises:
      InputError: another process has the folder.
      MachineError: it cannot be made.
    """
    try:
        _make(folder, take_over)
        with _locked(folder):
            keep = goes_on is not None and goes_on(folder)
            with _removed_on_failure(folder):
                if not keep:
                    remove_but(folder, ())
                yield folder
    except MoeccError:
        raise
    except BaseException:  # perhaps between making and locking it
        with suppress(OSError):
            os.rmdir(folder)
        raise


@contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:  # Ctrl-C and SIGTERM included: nothing half-written remains
        remove(folder)
        raise


def public_mode(folder: Path) -> int:
    """Return the mode that a private folder has once it is complete.

    Umask and default access lists decide it, so it is read from a file that was made inside.
    """
    files = (p for p in sorted(folder.iterdir()) if p.is_file())
    example = next(files, None)
    if example is None:
        mask = os.umask(0)
        os.umask(mask)
        mode = 0o777 & ~mask
    else:
        mode = example.stat().st_mode & 0o666
        mode |= (mode & 0o444) >> 2
    return mode | folder.stat().st_mode & 0o7000


def _make(folder: Path, take_over: bool) -> None:
    try:
        if take_over and (folder.is_symlink() or folder.is_file()):
            disk().unlink(folder)
        disk().mkdir(folder, _PRIVATE)
    except FileExistsError:
        if not take_over:
            raise InputError(BUSY, where=str(folder), hint=WAIT) from None
    except OSError as error:
        raise os_problem(error, folder, "make") from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; the system releases it with the process.

    Raises:
      InputError: another process took the folder.
    """
    try:
        descriptor = _open_folder(folder)
    except OSError as error:
        raise os_problem(error, folder, "open") from None
    try:
        if not _lock(descriptor) or not _is_at(descriptor, folder):
            raise InputError(BUSY, where=str(folder), hint=WAIT)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Take the lock unless another process has it; True where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _open_folder(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _is_at(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(folder))
    except OSError:
        return False
