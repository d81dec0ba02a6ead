"""Folders that one process at a time fills: made or taken over, locked, and never left half-filled.

A folder is emptied and removed only while its lock is held, so no writer removes what another one
fills.  The system releases a lock with the process that holds it: what a killed one left is free.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moecc.checkpoint.disk import disk
from moecc.checkpoint.files import os_problem
from moecc.checkpoint.removal import remove, remove_but
from moecc.errors import InputError, MoeccError

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
