"""``moecc import``: print the graph of a checkpoint as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from moecc.cli.console import Format
from moecc.cli.face import add_command
from moecc.cli.options import (
    FormatOption,
    LoadFamiliesOption,
    PaddingMaskOption,
    SourceArgument,
)


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
    format: FormatOption = Format.human


def import_graph(request: ImportRequest) -> None:
    """Read the headers of SOURCE and print its graph; no weights are read."""
    from moecc.cli.files import graph_text, write_artefact
    from moecc.families.outside import load_families
    from moecc.model.open import open_model

    load_families(request.load)
    with open_model(request.source, padding=request.padding_mask) as model:
        text = graph_text(model.graph, request.output)
    write_artefact("import", text, request.output, force=request.force, format=request.format)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    add_command(
        app,
        "import",
        ImportRequest,
        import_graph,
        "Example: moecc import SmolLM2-135M -o smollm2.moe",
    )
