"""``moecc import``: print the graph of a checkpoint as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from moecc.cli.face import add_command
from moecc.cli.options import LoadFamiliesOption, PaddingMaskOption, SourceArgument


@dataclass(frozen=True)
class ImportRequest:
    """The arguments and options of ``moecc import``."""

    source: SourceArgument
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="FILE", help="Where to write; stdout by default."),
    ] = None
    padding_mask: PaddingMaskOption = False
    load: LoadFamiliesOption = None
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False


def import_graph(request: ImportRequest) -> None:
    """Read the headers of SOURCE and print its graph; no weights are read."""
    from moecc.cli.files import write_graph
    from moecc.families.outside import load_families
    from moecc.model.open import open_model

    load_families(request.load)
    with open_model(request.source, padding=request.padding_mask) as model:
        write_graph(model.graph, request.output, force=request.force)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    add_command(
        app,
        "import",
        ImportRequest,
        import_graph,
        "Example: moecc import SmolLM2-135M -o smollm2.moe",
    )
