"""``moecc import``: the graph of a checkpoint, as text."""

from __future__ import annotations

from typing import Annotated

import typer

from moecc.cli.options import PaddingMaskOption, SourceArgument


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @app.command(
        "import",
        epilog="Example: moecc import SmolLM2-135M -o smollm2.moe",
    )
    def import_(
        source: SourceArgument,
        output: Annotated[
            str | None,
            typer.Option(
                "-o", "--output", metavar="FILE", help="Where to write; stdout by default."
            ),
        ] = None,
        padding_mask: PaddingMaskOption = False,
        force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    ) -> None:
        """Read the headers of SOURCE and print its graph; no weights are read."""
        from moecc.cli.files import write_text
        from moecc.ir.printer import print_graph
        from moecc.models import open_model

        with open_model(source, padding=padding_mask) as model:
            write_text(print_graph(model.graph), output, force=force)
