"""``moecc clean``: remove what killed conversions left beside an output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from moecc.cli.console import Format
from moecc.cli.face import add_command
from moecc.cli.options import FormatOption


@dataclass(frozen=True)
class CleanRequest:
    """The arguments of ``moecc clean``."""

    out: Annotated[
        list[str], typer.Argument(metavar="OUT…", help="Outputs of conversions, written or not.")
    ]
    format: FormatOption = Format.human


def clean(request: CleanRequest) -> None:
    """Remove what killed conversions left beside each OUT.

    An old output that was being replaced is put back if the new one is not there. A conversion that
    is running is left alone.
    """
    from pathlib import Path

    from moecc.cli.console import tell
    from moecc.formats.output import clean as cleaned

    done = {out: cleaned(Path(out)) for out in request.out}
    lines = [
        line
        for out, found in done.items()
        for line in found or [f"{out}: nothing was left beside it"]
    ]
    tell("clean", {"outputs": done}, "\n".join(lines), request.format)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    add_command(app, "clean", CleanRequest, clean, "Example: moecc clean smollm2-8x")
