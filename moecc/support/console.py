"""The console: spellings of parameters; the artefact to stdout, all else to stderr; progress."""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moecc.errors import MoeccError, escaped
from moecc.support.process import Closing

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


@dataclass(frozen=True)
class Spelling:
    """The spelling of a parameter on the command line, beyond its name and type.

    Attributes:
      metavar: what stands for the value in the help.
      short: a letter for a short option.
      help: the description, where the docstring of the command has none.
      complete: the function of `moecc.cli.complete` that completes the value.
      low: the least number.
      high: the greatest number.
      choices: the words that the value is one of.
      option: the name of the option, where it is not the parameter's.
      is_count: whether a number may end in K, M, B or T, as counts of tokens do.
    """

    metavar: str | None = None
    short: str = ""
    help: str = ""
    complete: str = ""
    low: float | None = None
    high: int | None = None
    choices: Sequence[str] = ()
    option: str = ""
    is_count: bool = False


SHELL_VARIABLE = "_MOECC_COMPLETE"
"""The environment variable by which the script of a shell asks for a completion."""

PROGRESS = threading.Event()
"""Set once a command shows its progress itself, so that no sign of life is added."""


def open_closed_streams() -> None:
    """Open the standard streams that the caller closed, to nowhere.

    A file that is opened later would have their number, and what is printed would be written to it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def write_utf8() -> None:
    """Write UTF-8 to stdout, whatever the locale: an artefact is the same as in a file.

    Characters that UTF-8 cannot encode are written as escapes, which JSON and Python read back.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")


_QUIET: ContextVar[bool] = ContextVar("quiet", default=False)


@contextmanager
def quietly(quiet: bool) -> Iterator[None]:
    """Leave out notes and progress within this context, if `quiet`; warnings and errors stay."""
    token = _QUIET.set(quiet)
    try:
        yield
    finally:
        _QUIET.reset(token)


def is_quiet() -> bool:
    """Return whether only warnings and errors are wanted on stderr."""
    return _QUIET.get()


def say(text: str) -> None:
    """Print a note to stderr; escape sequences in `text` are shown, not obeyed."""
    if not is_quiet():
        _line(escaped(text))


def warn(text: str) -> None:
    """Print a warning to stderr."""
    _line(f"warning: {escaped(text)}")


def _line(text: str) -> None:
    clear_line()
    print(text, file=sys.stderr)


def clear_line() -> None:
    """Remove what a sign of life has left on the line of a terminal."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def use_colour() -> bool:
    """Whether stderr is a terminal that supports colour."""
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return not is_plain and sys.stderr.isatty()


def show_error(error: MoeccError) -> None:
    """Print all problems of `error` to stderr."""
    red, plain = ("\033[31m", "\033[0m") if use_colour() else ("", "")
    for problem in error.problems:
        _line(f"{red}error:{plain} {escaped(str(problem))}")


class Bar(Closing):
    """A progress bar on a terminal, shown once the work has taken a second; otherwise silent."""

    def __init__(self, title: str, unit_bytes: bool = True) -> None:
        self._title = title
        self._unit_bytes = unit_bytes
        self._start = time.monotonic()
        self._shown: tuple[Progress, TaskID] | None = None

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._shown is not None:
            self._shown[0].stop()

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` are done."""
        if not sys.stderr.isatty() or is_quiet() or time.monotonic() - self._start < 1:
            return
        self._shown = self._shown or self._open(total)
        progress, task = self._shown
        progress.update(task, completed=done)

    def _open(self, total: int) -> tuple[Progress, TaskID]:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        # Until here a sign of life is shown: the first call may come after minutes.
        PROGRESS.set()
        clear_line()
        columns = [TextColumn("{task.description}"), BarColumn()]
        if self._unit_bytes:
            columns.append(DownloadColumn())
        # What is left, at the rate of the last minute: disks slow down when their cache is full.
        columns.append(TimeRemainingColumn())
        console = Console(stderr=True)
        progress = Progress(*columns, console=console, transient=True, speed_estimate_period=60)
        task = progress.add_task(self._title, total=total)
        progress.start()
        return progress, task
