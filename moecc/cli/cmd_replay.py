"""``moecc replay``: let a pipeline fail once more, from its reproducer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from moecc.cli.console import Format
from moecc.cli.face import add_command
from moecc.cli.options import FormatOption, LoadOption


@dataclass(frozen=True)
class ReplayRequest:
    """The arguments of ``moecc replay``."""

    reproducer: Annotated[
        str, typer.Argument(metavar="REPRODUCER", help="A .moe file that a failure left.")
    ]
    load: LoadOption = None
    format: FormatOption = Format.human


def replay(request: ReplayRequest) -> None:
    """Repeat a failure from its reproducer, and end with its message and exit code.

    Passes of your own that it needs are copied beside it, and run only where --load names them.
    """
    from moecc.cli.console import tell
    from moecc.tasks.replay import replay as repeat
    from moecc.version import __version__

    done = repeat(request.reproducer, request.load or [])
    since = "" if done.moecc == __version__ else f"; it failed in moecc {done.moecc}"
    data = {"fails": False, "pipeline": str(done.pipeline), "failed_in": done.moecc}
    tell("replay", data, f"nothing fails: {done.pipeline}{since}", request.format)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    add_command(app, "replay", ReplayRequest, replay, "Example: moecc replay moecc-crash-1.moe")
