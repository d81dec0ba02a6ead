"""``moecc evaluate``: held-out losses and accuracies of models, paired."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from moecc.cli import complete
from moecc.cli.console import Format
from moecc.cli.face import add_command
from moecc.cli.heartbeat import Progress
from moecc.cli.options import FormatOption, LoadFamiliesOption
from moecc.support.text import amount

if TYPE_CHECKING:
    from moecc.tasks.evaluate import Evaluated


@dataclass(frozen=True)
class EvaluateRequest:
    """The arguments and options of ``moecc evaluate``."""

    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL…", help="As other commands take them.", show_default=False),
    ]
    data: Annotated[
        list[str],
        typer.Option("--data", metavar="DIR", help="A token folder; may be repeated."),
    ]
    sequence: Annotated[
        int, typer.Option("--sequence", metavar="N", min=2, help="Tokens of a sequence.")
    ] = 512
    batch: Annotated[
        int, typer.Option("--batch", metavar="N", min=1, help="Sequences at a time.")
    ] = 8
    batches: Annotated[
        int, typer.Option("--batches", metavar="N", min=1, help="The most of a folder.")
    ] = 64
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", help="The type to compute in.", autocompletion=complete.float_types
        ),
    ] = "f32"
    load: LoadFamiliesOption = None
    format: FormatOption = Format.human


def evaluate(request: EvaluateRequest) -> None:
    """Evaluate each MODEL on token folders; the second and later ones are paired with the first.

    Texts have a loss, examples an exact match, labelled examples an accuracy and a macro F1.
    """
    from moecc.cli.console import Bar, report
    from moecc.families.outside import load_families
    from moecc.tasks.evaluate import EvaluationSpec
    from moecc.tasks.evaluate import evaluate as evaluated
    from moecc.types import float_type

    load_families(request.load)
    settings = EvaluationSpec(
        request.sequence, request.batch, request.batches, float_type(request.dtype)
    )
    with Bar("evaluating", unit_bytes=False) as bar:
        found = evaluated(request.models, request.data, settings, bar)
    data = {
        "sequence": request.sequence, "batch": request.batch, "dtype": settings.dtype.name,
        "models": [one.to_json() for one in found],
    }  # fmt: skip
    report("evaluate", data, lambda: evaluation_text(found), request.format)


def evaluation_text(found: Sequence[Evaluated]) -> str:
    """Return the human-readable report."""
    lines = []
    for one in found:
        lines.append(one.model)
        for name, score in one.sets.items():
            parts = [f"loss {score.scores.loss:.4f}"]
            for title, value in (
                ("exact", score.exact), ("accuracy", score.accuracy), ("F1", score.f1)
            ):  # fmt: skip
                if value is not None:
                    parts.append(f"{title} {value:.3f}")
            against = one.against.get(name)
            if against is not None:
                parts.append(
                    f"{against.mean:+.4f} ({against.low:+.4f} to {against.high:+.4f}) against "
                    f"{found[0].model}"
                )
            tokens = int(score.scores.tokens.sum())
            lines.append(f"  {name:16} {', '.join(parts)}, {amount(tokens, 'token')}")
    return "\n".join(lines)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    add_command(
        app,
        "evaluate",
        EvaluateRequest,
        evaluate,
        "Example: moecc evaluate SmolLM2-135M run@best --data tokens/heldout",
        progress=Progress.BAR,
    )
