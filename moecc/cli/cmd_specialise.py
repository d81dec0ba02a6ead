"""``moecc specialise``: which tokens go to which expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from moecc.cli import complete
from moecc.cli.console import Format
from moecc.cli.face import add_command
from moecc.cli.options import FormatOption, LoadFamiliesOption, ModelArgument
from moecc.support.untyped import JsonDict


@dataclass(frozen=True)
class SpecialiseRequest:
    """The arguments and options of ``moecc specialise``."""

    model: ModelArgument
    data: Annotated[
        str, typer.Option("--data", metavar="DIR", help="A token folder.", show_default=False)
    ]
    pipeline: Annotated[
        str,
        typer.Option(
            "-p",
            "--pipeline",
            help="Passes to run first: upcycle{experts=8}.",
            autocompletion=complete.pipelines,
        ),
    ] = ""
    sequence: Annotated[
        int, typer.Option("--sequence", metavar="N", min=2, help="Tokens of a sequence.")
    ] = 512
    batch: Annotated[
        int, typer.Option("--batch", metavar="N", min=1, help="Sequences at a time.")
    ] = 8
    batches: Annotated[
        int, typer.Option("--batches", metavar="N", min=1, help="The most that are read.")
    ] = 8
    seed: Annotated[
        int, typer.Option("--seed", help="Of routers that learnt nothing, and of the passes.")
    ] = 0
    load: LoadFamiliesOption = None
    format: FormatOption = Format.human


def specialise(request: SpecialiseRequest) -> None:
    """Trace the routers of MODEL over a text, and show which tokens tell each expert from others.

    Beside it stands what routers explain that learnt nothing: they also send like tokens to like
    experts.
    """
    from moecc.cli.console import report
    from moecc.families.outside import load_families
    from moecc.tasks.evaluate import EvaluationSpec
    from moecc.tasks.specialise import specialise as specialised

    load_families(request.load)
    spec = EvaluationSpec(request.sequence, request.batch, request.batches)
    found = specialised(
        request.model, request.data, spec, pipeline=request.pipeline, seed=request.seed
    )
    layers = [layer.to_json() for layer in found]
    data = {"model": request.model, "data": request.data, "layers": layers}
    report("specialise", data, lambda: specialisation_text(layers), request.format)


def specialisation_text(layers: Sequence[JsonDict]) -> str:
    """Return the human-readable report."""
    lines = []
    for layer in layers:
        lines.append(
            f"{layer['layer']}: the token alone explains {layer['explained']:.0%} of the choice "
            f"(untrained routers {layer['untrained']:.0%}, by chance {layer['by_chance']:.0%})"
        )
        if layer["sentinel_entropy"] is not None:
            lines.append(
                f"  entropy over experts: sentinels {layer['sentinel_entropy']:.2f}, other tokens "
                f"{layer['other_entropy']:.2f}, even {layer['even_entropy']:.2f} nats"
            )
        lines.append("  expert  share  tokens that tell it from others, and how many went there")
        for expert, one in enumerate(layer["experts"]):
            shown = "   ".join(f"{t['token']} {t['part']:.0%}" for t in one["tokens"])
            lines.append(f"  {expert:6}  {one['share']:5.0%}  {shown}")
    return "\n".join(lines)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    add_command(
        app,
        "specialise",
        SpecialiseRequest,
        specialise,
        "Example: moecc specialise run@best --data tokens/heldout",
    )
