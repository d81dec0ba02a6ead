"""A sign of life of a command that says nothing: on a terminal after a second, else in lines."""

from __future__ import annotations

import os
import sys
import threading
import time
from enum import Enum
from types import TracebackType

from moecc.cli.console import clear_line

VARIABLE = "MOECC_PROGRESS"
"""The environment variable by which scripts that compare what is said switch it ``off``."""

FIRST_SECONDS = 1.0
LINE_SECONDS = (10.0, 30.0, 60.0)
"""When lines come where nobody watches; after the last, each so much later."""


class Progress(Enum):
    """How a command shows that it works."""

    NONE = "none"
    BAR = "a bar on a terminal, nothing elsewhere"
    OWN = "wherever it runs"


class Heartbeat:
    """Shows on the standard error for how long a command has been working, until it ends.

    Args:
      name: of the command.
      progress: what the command shows itself, to which nothing is added.
      quiet: whether nothing is shown.
    """

    def __init__(self, name: str, progress: Progress, *, quiet: bool = False) -> None:
        is_shown = progress is Progress.NONE or (
            progress is Progress.BAR and not sys.stderr.isatty()
        )
        is_wanted = not quiet and os.environ.get(VARIABLE) != "off"
        self._name, self._shown = name, is_shown and is_wanted
        self._over = threading.Event()
        self._is_open = False
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        if self._shown:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._shown:
            self._thread.join()
        if self._is_open:
            clear_line()

    def _beat(self) -> None:
        start, is_watched = time.monotonic(), sys.stderr.isatty()
        times = FIRST_SECONDS if is_watched else LINE_SECONDS[0]
        lines = 0
        while not self._over.wait(max(0.0, start + times - time.monotonic())):
            text = f"{self._name}: {_duration(times)} so far"
            if is_watched:
                # What is printed next begins at the start of this line, and hides it.
                print(f"\r\033[K{text}\r", end="", file=sys.stderr, flush=True)
                self._is_open, times = True, times + FIRST_SECONDS
                continue
            print(text, file=sys.stderr, flush=True)
            lines += 1
            times = LINE_SECONDS[lines] if lines < len(LINE_SECONDS) else times + LINE_SECONDS[-1]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
