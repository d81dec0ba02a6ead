"""A process of a multi-process run: reports its progress, and ends with the others.

A process that hangs in a collective neither fails nor finishes, and no timeout of JAX covers it.
So each process reports its steps: to the supervisor, over a pipe, if there is one; and to a
watchdog thread, which ends the process with a stack trace if no step comes in time.
"""

from __future__ import annotations

import faulthandler
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from moecc.errors import MachineError, UsageError

BEATS, LIFELINE, LIMIT = "MOECC_BEATS_FD", "MOECC_LIFELINE_FD", "MOECC_STEP_SECONDS"
JOIN = "MOECC_JOIN_SECONDS"

EXIT_CODE = MachineError.exit_code


class Watchdog:
    """Ends this process if no step is reported in time.

    The thread needs the interpreter lock now and then; a library that holds it forever is left to
    the supervisor.

    Args:
      limit_seconds: the longest time between two steps; None for no limit.
      end: ends the process; by default ``os._exit``.
    """

    def __init__(
        self, limit_seconds: float | None, end: Callable[[int], object] = os._exit
    ) -> None:
        self._limit = limit_seconds
        self._end = end
        self._step = threading.Event()
        self._done = False
        self._what = "start"
        self._beats = _descriptor(BEATS)
        if limit_seconds is not None:
            threading.Thread(target=self._watch, daemon=True, name="moecc-watchdog").start()

    def beat(self, what: str) -> None:
        """Report that this process reached the step `what`."""
        self._what = what
        self._step.set()
        if self._beats is not None:
            try:
                os.write(self._beats, b".")
            except OSError:
                # The supervisor has exited; the lifeline ends this process.
                self._beats = None

    def stop(self) -> None:
        """Stop watching."""
        self._done = True
        self._step.set()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _watch(self) -> None:
        while not self._done:
            if not self._step.wait(self._limit):
                self._bite()
                return
            self._step.clear()

    def _bite(self) -> None:
        _say(f"no step for {self._limit:g} s, the last one was: {self._what}; the stacks:")
        faulthandler.dump_traceback(file=2, all_threads=True)
        self._end(EXIT_CODE)


def watchdog_of_environment() -> Watchdog:
    """Return a watchdog with the limit in ``MOECC_STEP_SECONDS``, or without one.

    Raises:
      UsageError: the limit is not a number of seconds.
    """
    return Watchdog(seconds_of_environment(LIMIT))


def seconds_of_environment(name: str) -> float | None:
    """Return the seconds in a variable, or None if it is not set.

    Raises:
      UsageError: it is not a number of seconds.
    """
    text = os.environ.get(name, "")
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise UsageError("not a number of seconds", where=name, expected="300", found=text)
    return seconds


_joined = False


def note_joined() -> None:
    """Note that this process computes together with the others."""
    global _joined
    _joined = True


def has_joined() -> bool:
    """Whether this process computes together with the others."""
    return _joined


def hold_lifeline() -> None:
    """End this process when its supervisor exits for any reason; without one, do nothing."""
    descriptor = _descriptor(LIFELINE)
    if descriptor is not None:
        threading.Thread(target=_follow, args=(descriptor,), daemon=True).start()


def _follow(descriptor: int) -> NoReturn:
    # The supervisor never writes; the end of the pipe means that it has exited.
    while os.read(descriptor, 1):
        pass
    _say("the supervisor has gone")
    os._exit(EXIT_CODE)


def _say(text: str) -> None:
    # The reader may have exited.
    with suppress(OSError):
        os.write(2, f"error: {text}\n".encode())


def _descriptor(name: str) -> int | None:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        return None
    try:
        os.fstat(int(text))
    except OSError:
        return None
    return int(text)
