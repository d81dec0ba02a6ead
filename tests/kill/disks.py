"""Disks that go wrong at one call: the process is killed, is signalled, or hears of an error."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moecc.formats.files import Disk


class CountingDisk(Disk):
    """Counts the calls.

    Attributes:
      at: the number of the call at which something happens, from 0; None for never.
      calls: how many there were.
    """

    def __init__(self, at: int | None = None):
        self.at = at
        self.calls = 0
        self._lock = threading.RLock()

    def happen(self):
        """What happens at the call, before it."""

    def after(self):
        """What happens at the call, after it."""

    @contextmanager
    def call(self) -> Iterator[bool]:
        """Count a call, one at a time, and yield whether it is the one."""
        with self._lock:
            self.calls += 1
            is_it = self.calls - 1 == self.at
            if is_it:
                self.happen()
            yield is_it
            if is_it:
                self.after()

    def open(self, path: Path, flags: int) -> int:
        with self.call():
            return super().open(path, flags)

    def truncate(self, descriptor: int, size_bytes: int):
        with self.call():
            super().truncate(descriptor, size_bytes)

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        with self.call():
            return super().write(descriptor, data, offset)

    def append(self, descriptor: int, data: bytes):
        with self.call():
            super().append(descriptor, data)

    def sync(self, descriptor: int):
        # A loss of power is simulated; waiting for the disk would only take time.
        with self.call():
            pass

    def rename(self, source: Path, target: Path):
        with self.call():
            super().rename(source, target)

    def replace(self, source: Path, target: Path):
        with self.call():
            super().replace(source, target)

    def link(self, source: Path, target: Path):
        with self.call():
            super().link(source, target)

    def mkdir(self, path: Path, mode: int = 0o777):
        with self.call():
            super().mkdir(path, mode)

    def chmod(self, path: Path, mode: int):
        with self.call():
            super().chmod(path, mode)

    def unlink(self, path: Path):
        with self.call():
            super().unlink(path)

    def remove_tree(self, path: Path):
        with self.call():
            super().remove_tree(path)


class SignalDisk(CountingDisk):
    """Sends this process a signal before a call, or after it."""

    def __init__(self, at: int | None, number: int, late: bool):
        super().__init__(at)
        self.number, self.late = number, late

    def happen(self):
        if not self.late:
            os.kill(os.getpid(), self.number)

    def after(self):
        if self.late:
            os.kill(os.getpid(), self.number)


class FullDisk(CountingDisk):
    """Has no room at a call; a folder that cannot be removed stays."""

    def happen(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def remove_tree(self, path: Path):
        try:
            super().remove_tree(path)
        except OSError:
            return


class KillingDisk(CountingDisk):
    """Kills the process at a call, with half of what it writes or removes done."""

    def happen(self):
        """Wait for `die`, where a call is cut in half."""

    def die(self):
        """End the process as the system would."""
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    @contextmanager
    def call(self) -> Iterator[bool]:
        """Count a call; kill before it, unless its caller asks for half of it."""
        with super().call() as is_it:
            if is_it:
                self.die()
            yield False

    def _half(self, work: Callable[[], object]):
        """Do `work` and die if the next call is the one."""
        if self.calls == self.at:
            work()

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        with self._lock:
            self._half(lambda: os.pwrite(descriptor, data[: len(data) // 2], offset))
            return super().write(descriptor, data, offset)

    def append(self, descriptor: int, data: bytes):
        with self._lock:
            self._half(lambda: os.write(descriptor, data[: len(data) // 2]))
            super().append(descriptor, data)

    def remove_tree(self, path: Path):
        with self._lock:
            self._half(lambda: remove_half(path))
            super().remove_tree(path)


def remove_half(path: Path):
    """Remove some of what is in a folder."""
    names = sorted(path.iterdir())
    for name in names[: len(names) // 2]:
        shutil.rmtree(name) if name.is_dir() else name.unlink()
