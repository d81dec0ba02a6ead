"""The folders beside an output while it is written, and what a killed conversion left of them.

``OUT`` is filled as ``.OUT.moecc-partial``; an old output that it replaces is ``.OUT.moecc-old``
between two renames and while it is deleted.  Both outlive a process that is killed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moecc.checkpoint.files import os_problem
from moecc.checkpoint.problems import Problems
from moecc.errors import InputError

_BLOCK_BYTES = 512
_BUSY = "another conversion is writing this output"


def partial_of(folder: Path) -> Path:
    """Return where the output `folder` is filled."""
    return folder.with_name(f".{folder.name}.moecc-partial")


def replaced_of(folder: Path) -> Path:
    """Return where the old output `folder` is until the new one has its place."""
    return folder.with_name(f".{folder.name}.moecc-old")


def check_leftovers(folder: Path, out: Path, force: bool, problems: Problems) -> None:
    """Report a conversion that is running, and without `force` what a killed one left."""
    partial, old = partial_of(folder), replaced_of(folder)
    if is_locked(partial):
        problems.add(_BUSY, where=str(out), found=str(partial), hint="wait until it has finished")
        return
    if force:
        return
    if os.path.lexists(partial):
        problems.add(
            "an earlier conversion was killed and left its partial output behind", where=str(out),
            found=f"{partial}, {_bytes_of(partial):,} bytes", hint="--force removes it",
        )  # fmt: skip
    if os.path.lexists(old):
        back = f"; mv {old} {out} brings it back" if not os.path.lexists(folder) else ""
        problems.add(
            "an earlier conversion was killed while it replaced this output", where=str(out),
            found=f"the old output is {old}",
            hint=f"--force removes it once the new one is complete{back}",
        )  # fmt: skip


def leftover_bytes(folder: Path) -> int:
    """Return the disk space of what a killed conversion left, which `remove` frees."""
    return _bytes_of(partial_of(folder))


def remove(path: Path) -> None:
    """Remove a folder, or whatever has its name; errors are ignored, links are not followed."""
    if os.path.islink(path) or os.path.isfile(path):
        with suppress(OSError):
            os.unlink(path)
        return
    try:
        # rmtree uses descriptors: a link created meanwhile is removed, never followed.
        shutil.rmtree(path, ignore_errors=True)
    except BaseException:  # a second Ctrl-C: finish what the first one asked for
        shutil.rmtree(path, ignore_errors=True)
        raise


def is_locked(folder: Path) -> bool:
    """Return whether another process holds the lock of a folder."""
    try:
        descriptor = _open_folder(folder)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder that this process made; the system releases it with the process.

    Raises:
      InputError: another process took the folder.
    """
    try:
        descriptor = _open_folder(folder)
    except OSError as error:
        raise os_problem(error, folder, "open") from None
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(descriptor, folder):
            raise InputError(_BUSY, where=str(folder), hint="wait until it has finished")
        yield
    finally:
        os.close(descriptor)


def _open_folder(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _is_at(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(folder))
    except OSError:
        return False


def _bytes_of(path: Path) -> int:
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_blocks * _BLOCK_BYTES
    return total
