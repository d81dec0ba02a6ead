"""Signals, clean-up and garbage collection of a command's process."""

from __future__ import annotations

import gc
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Self


class Closing(ABC):
    """Gives a class with `close` the methods of a context manager."""

    @abstractmethod
    def close(self) -> None:
        """Close what is open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    is_limited = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if is_limited else os.cpu_count() or 1


# Pause the cyclic garbage collector during large allocations.
#
# A graph of 50,000 nodes, or a header of 100,000 tensors, is millions of objects; each full
# collection traverses them all and frees nothing, which doubles the cost of a node.


@contextmanager
def gc_paused() -> Iterator[None]:
    """Disable the collector inside; nests, and leaves an already disabled collector alone."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# Signals that ask a command to end become exceptions, so that it cleans up.

_ENDING = (signal.SIGTERM, signal.SIGHUP)


class Terminated(BaseException):
    """A signal asked this process to end; no handler of errors catches it by accident.

    Attributes:
      signal: which one.
    """

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(f"terminated by {self.signal.name}")

    @property
    def exit_code(self) -> int:
        """The exit code of a shell for a process that this signal ended: 143 for SIGTERM."""
        return 128 + self.signal


@contextmanager
def signals_raised() -> Iterator[None]:
    """Raise `Terminated` in the main thread on SIGTERM and SIGHUP; SIGINT already raises.

    Once one has arrived, further ones are ignored: they would interrupt the cleaning up.  A signal
    that the caller ignores, as ``nohup`` does with SIGHUP, stays ignored.  In another thread than
    the main one, which cannot set handlers, nothing changes.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = {s: signal.getsignal(s) for s in _ENDING if is_main}
    caught = [s for s, handler in before.items() if handler == signal.SIG_DFL]
    for number in caught:
        signal.signal(number, _raise)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, before[number])


class StopRequest:
    """The signal that asked a command to end, once there is one.

    Attributes:
      signal: which one; None as long as none came.
      note: a line for standard error when the first comes.
    """

    def __init__(self, note: str = "") -> None:
        self.signal: signal.Signals | None = None
        self.note = note

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; a second one raises, as without this handler."""
        if self.signal is not None:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)
        self.signal = signal.Signals(number)
        if self.note:
            # Not by print: the handler may interrupt a write to the same stream.
            with suppress(OSError):
                os.write(2, f"\n{self.note}\n".encode())


@contextmanager
def signals_noted(note: str = "") -> Iterator[StopRequest]:
    """Note SIGINT, SIGTERM and SIGHUP, so that work comes to an end in order; the second raises.

    The first writes the line `note` to standard error.

    A signal that the caller ignores stays ignored, and in another thread than the main one nothing
    changes.
    """
    asked = StopRequest(note)
    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, *_ENDING) if is_main else ()
    before = {s: signal.getsignal(s) for s in numbers}
    caught = [s for s, handler in before.items() if handler != signal.SIG_IGN]
    for number in caught:
        signal.signal(number, asked)
    try:
        yield asked
    finally:
        for number in caught:
            signal.signal(number, before[number])


def _raise(number: int, frame: FrameType | None) -> None:
    for ending in _ENDING:
        signal.signal(ending, signal.SIG_IGN)
    raise Terminated(number)
