"""``moecc report``: runs compared on one self-contained page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from moecc.cli.console import Format
from moecc.cli.face import add_command
from moecc.cli.options import FormatOption


@dataclass(frozen=True)
class ReportRequest:
    """The arguments and options of ``moecc report``."""

    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN…", help="Folders of moecc train.", show_default=False),
    ]
    html: Annotated[
        str, typer.Option("--html", metavar="FILE", help="The page to write.", show_default=False)
    ]
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="DIR", help="A token folder, to trace the experts over."),
    ] = None
    sequence: Annotated[
        int, typer.Option("--sequence", metavar="N", min=2, help="Tokens of a sequence of it.")
    ] = 512
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False
    format: FormatOption = Format.human


def report(request: ReportRequest) -> None:
    """Write a page that compares RUN…: curves, held-out losses, loads of experts, alarms.

    With --data it also has which tokens go to which expert, beside routers that learnt nothing.
    The page is one file and loads nothing.
    """
    from pathlib import Path

    from moecc.cli.console import tell
    from moecc.cli.files import check_writable, write_whole
    from moecc.tasks.evaluate import EvaluationSpec
    from moecc.tasks.specialise import specialise
    from moecc.train.report_page import report_page
    from moecc.train.run import read_run

    check_writable(request.html, force=request.force)
    runs = [read_run(Path(run)) for run in request.runs]
    specialised = {}
    if request.data is not None:
        spec = EvaluationSpec(seq=request.sequence, batches=8)
        for path, run in zip(request.runs, runs, strict=True):
            if run.layers:
                found = specialise(path, request.data, spec)
                specialised[run.name] = [layer.to_json() for layer in found]
    write_whole(request.html, report_page(runs, specialised).encode(), force=request.force)
    data = {"html": request.html, "runs": {run.name: run.facts for run in runs}}
    tell("report", data, f"written to {request.html}", request.format)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    add_command(
        app, "report", ReportRequest, report,
        "Example: moecc report dense sparse --html runs.html --data tokens/heldout",
    )  # fmt: skip
