"""``moecc lint``: what the design guide advises against in a model or a pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from moecc.cli import complete
from moecc.cli.console import Format
from moecc.cli.face import add_command
from moecc.cli.options import FormatOption, LoadOption

if TYPE_CHECKING:
    from moecc.tasks.lint import Linted


class Warnings(StrEnum):
    """What findings are."""

    report = "report"
    error = "error"


@dataclass(frozen=True)
class LintRequest:
    """The arguments and options of ``moecc lint``."""

    target: Annotated[
        str,
        typer.Argument(metavar="MODEL|PIPELINE", help="A model, or the text of a pipeline.",
                       autocompletion=complete.models_or_pipelines,
                       show_default=False),
    ]  # fmt: skip
    cores: Annotated[
        int | None,
        typer.Option("--cores", min=1, help="Of the machine that a model is for."),
    ] = None
    warnings: Annotated[
        Warnings, typer.Option("--warnings", help="With error, a finding is exit code 1.")
    ] = Warnings.report
    load: LoadOption = None
    format: FormatOption = Format.human


def lint(request: LintRequest) -> int:
    """Show what the design guide of ST-MoE advises against, each with the section that says so.

    No weights are read. The warnings that other commands print are shown, too.
    """
    from moecc.cli.console import report
    from moecc.model.open import registry_with
    from moecc.pipeline.text import Pipeline
    from moecc.tasks.lint import is_model, lint_model, lint_pipeline

    registry = registry_with(request.load or [])
    if is_model(request.target):
        found = lint_model(request.target, request.cores)
    else:
        found = lint_pipeline(Pipeline.parse(request.target, registry))
    report("lint", lint_json(request.target, found), lambda: _text(found), request.format)
    return int(bool(found.findings) and request.warnings is Warnings.error)


def lint_json(target: str, linted: Linted) -> dict[str, object]:
    """Return what was found as JSON values."""
    names = ("what", "where", "expected", "found", "hint")
    rows = [{name: getattr(p, name) for name in names} for p in linted.findings]
    return {"target": target, "kind": linted.kind, "findings": rows}


def _text(linted: Linted) -> str:
    return "\n".join(map(str, linted.findings)) or f"nothing to say against this {linted.kind}"


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    add_command(
        app, "lint", LintRequest, lint,
        "Example: moecc lint 'upcycle{experts=512 gates=softmax}' --warnings error",
    )  # fmt: skip
