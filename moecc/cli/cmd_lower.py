"""``moecc lower``: print a model's program at a level of lowering."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from moecc.cli import complete
from moecc.cli.console import Format
from moecc.cli.face import add_command
from moecc.cli.options import FormatOption, LoadFamiliesOption, WeightsOption


@dataclass(frozen=True)
class LowerRequest:
    """The arguments and options of ``moecc lower``."""

    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A Hugging Face folder, a .gguf, a .moe, or preset:NAME."
        ),
    ]
    emit: Annotated[
        str, typer.Option("--emit", help="jaxpr, stablehlo, or hlo as compiled here.")
    ] = "stablehlo"
    dispatch: Annotated[
        str,
        typer.Option(
            "--dispatch",
            help="auto, or one for all: gather, grouped, blocks, ragged_dot, gathered, used.",
        ),
    ] = "auto"
    platform: Annotated[
        str | None,
        typer.Option("--platform", help="cpu, gpu or tpu; by default that of this machine."),
    ] = None
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences.")] = 2
    seq: Annotated[int, typer.Option("--seq", min=1, help="Tokens of a sequence.")] = 128
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", help="The type to compute in.", autocompletion=complete.float_types
        ),
    ] = "f32"
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where to write, not to stdout."),
    ] = None
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False
    weights: WeightsOption = None
    load: LoadFamiliesOption = None
    format: FormatOption = Format.human


def lower(request: LowerRequest) -> None:
    """Print MODEL as jax or XLA sees it; no weights are read, and nothing is run."""
    from moecc.backend import get_lowering_backend
    from moecc.cli.files import check_writable, write_artefact
    from moecc.families.outside import load_families
    from moecc.model.inputs import default_inputs
    from moecc.model.open import open_model
    from moecc.types import float_type

    if request.output is not None and request.output != "-":
        check_writable(request.output, force=request.force)
    load_families(request.load)
    type, backend = float_type(request.dtype), get_lowering_backend("xla")
    options = {"dispatch": request.dispatch, "platform": request.platform}
    with open_model(request.model, weights=request.weights) as opened:
        inputs = default_inputs(opened.graph, batch=request.batch, seq=request.seq)
        text = backend.lower(opened.graph, inputs, emit=request.emit, dtype=type, options=options)
    text = text if text.endswith("\n") else f"{text}\n"
    write_artefact(
        "lower", text, request.output, force=request.force, format=request.format,
        emit=request.emit,
    )  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    add_command(
        app,
        "lower",
        LowerRequest,
        lower,
        "Example: moecc lower layer.moe --emit stablehlo --dispatch grouped",
    )
