"""``moecc lower``: what a graph becomes on its way to a machine."""

from __future__ import annotations

from typing import Annotated

import typer

from moecc.cli.options import WeightsOption


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @app.command(
        "lower",
        epilog="Example: moecc lower layer.moe --emit stablehlo --dispatch grouped",
    )
    def lower(
        model: Annotated[
            str,
            typer.Argument(
                metavar="MODEL", help="A Hugging Face folder, a .gguf, a .moe, or preset:NAME."
            ),
        ],
        emit: Annotated[
            str, typer.Option("--emit", help="jaxpr, stablehlo, or hlo as compiled here.")
        ] = "stablehlo",
        dispatch: Annotated[
            str,
            typer.Option(
                "--dispatch",
                help="auto, or scan, einsum, gather, grouped, ragged_dot, gathered for all layers.",
            ),
        ] = "auto",
        platform: Annotated[
            str | None,
            typer.Option("--platform", help="cpu, gpu or tpu; by default that of this machine."),
        ] = None,
        batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences.")] = 2,
        seq: Annotated[int, typer.Option("--seq", min=1, help="Tokens of a sequence.")] = 128,
        dtype: Annotated[str, typer.Option("--dtype", help="The type to compute in.")] = "f32",
        output: Annotated[
            str | None,
            typer.Option("--output", "-o", metavar="FILE", help="Where to write, not to stdout."),
        ] = None,
        force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
        weights: WeightsOption = None,
    ) -> None:
        """Print MODEL as jax or XLA sees it; no weights are read, and nothing is run."""
        from moecc.backend import get_lowering_backend
        from moecc.cli.files import check_writable, write_text
        from moecc.inputs import default_inputs
        from moecc.models import open_model
        from moecc.settings import float_type

        if output is not None and output != "-":
            check_writable(output, force=force)
        type, backend = float_type(dtype), get_lowering_backend("xla")
        options = {"dispatch": dispatch, "platform": platform}
        with open_model(model, weights=weights) as opened:
            inputs = default_inputs(opened.graph, batch=batch, seq=seq)
            text = backend.lower(opened.graph, inputs, emit=emit, dtype=type, options=options)
        write_text(text if text.endswith("\n") else f"{text}\n", output, force=force)
