"""What the examples have in common as scripts: their exit codes, where they print and write."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.markup import escape

from moecc.cli.main import main as moecc
from moecc.errors import MachineError, MoeccError
from moecc.support.console import show_error

OUT = Path(__file__).resolve().parent.parent / "demo-output"
"""The folder that examples write into unless they are told another one."""

console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)


class CommandError(MoeccError):
    """A command failed; it said why."""


def call(*words: object) -> None:
    """Show a command of ``moecc`` and run it. Raises CommandError if it fails."""
    command = [str(word) for word in words]
    console.print(f"[dim]$ moecc {escape(shlex.join(command))}[/dim]")
    if moecc(command) != 0:
        raise CommandError(f"moecc {command[0]} failed", hint="its message is above")


def exit_code(work: Callable[[], None]) -> int:
    """Do the work and return the exit code, as ``moecc`` has them."""
    try:
        work()
    except MoeccError as error:
        show_error(error)
        return error.exit_code
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return MachineError.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


@contextmanager
def step(title: str) -> Iterator[None]:
    """Print the title of a step, and how long it took."""
    console.print(f"\n[bold]{title}[/bold]")
    start = perf_counter()
    yield
    console.print(f"  [dim]{perf_counter() - start:.1f} s[/dim]")
