"""``moecc capture``: statistics of the values of a model over texts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from moecc.cli import complete
from moecc.cli.console import Format
from moecc.cli.face import add_command
from moecc.cli.heartbeat import Progress
from moecc.cli.options import FormatOption, LoadFamiliesOption
from moecc.support.text import amount

if TYPE_CHECKING:
    from moecc.capture import CaptureFacts


@dataclass(frozen=True)
class CaptureRequest:
    """The arguments and options of ``moecc capture``."""

    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A model with weights.")]
    text: Annotated[
        list[str],
        typer.Option(
            "--text", metavar="[NAME=]PATH",
            help="A file of text, or a token folder; may be repeated, each a text of its own.",
        ),
    ]  # fmt: skip
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="The folder to write.")]
    at: Annotated[str, typer.Option("--at", metavar="GLOB", help="The locations: layers.3.*.")] = (
        "*"
    )
    pipeline: Annotated[
        str,
        typer.Option(
            "-p", "--pipeline", help="Passes that are run first.", autocompletion=complete.pipelines
        ),
    ] = ""
    sequence: Annotated[
        int, typer.Option("--sequence", metavar="N", min=2, help="Tokens of a sequence.")
    ] = 512
    batch: Annotated[
        int, typer.Option("--batch", metavar="N", min=1, help="Sequences at a time.")
    ] = 2
    batches: Annotated[
        int, typer.Option("--batches", metavar="N", min=1, help="The most of a text.")
    ] = 64
    active: Annotated[
        float,
        typer.Option("--active", metavar="SHARE", help="Of a token's neurons: those at work."),
    ] = 0.1
    load: LoadFamiliesOption = None
    force: Annotated[bool, typer.Option("--force", help="Replace an existing DIR.")] = False
    format: FormatOption = Format.human


def capture(request: CaptureRequest) -> None:
    """Run SOURCE over texts and write statistics of its blocks and experts.

    Methods read them: convert --capture DIR with upcycle{split=activation},
    upcycle{router-init=ridge}, prune{by=saliency} or merge{by=result}.
    """
    from moecc.cli.console import Bar, report
    from moecc.families.outside import load_families
    from moecc.support.process import signals_raised
    from moecc.tasks.capture import CaptureSpec
    from moecc.tasks.capture import capture as captured

    load_families(request.load)
    spec = CaptureSpec(request.at, request.batches, request.sequence, request.batch, request.active)
    with signals_raised(), Bar("capturing", unit_bytes=False) as bar:
        facts = captured(
            request.source, request.text, request.out, spec, pipeline=request.pipeline,
            force=request.force, progress=bar,
        )  # fmt: skip
    data = {"folder": request.out, **asdict(facts)}
    report("capture", data, lambda: capture_text(request.out, facts), request.format)


def capture_text(folder: str, facts: CaptureFacts) -> str:
    """Return the human-readable report of what was written."""
    texts = ", ".join(facts.texts)
    return f"{folder}: statistics of {amount(facts.tokens, 'token')} of {texts}"


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    add_command(
        app,
        "capture",
        CaptureRequest,
        capture,
        "Example: moecc capture SmolLM2-135M --text README.md --out captured",
        progress=Progress.BAR,
    )
