"""``moecc passes``: the registry, or one pass with its options."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from moecc.cli import complete
from moecc.cli.console import Format
from moecc.cli.face import add_command
from moecc.cli.options import FormatOption, LoadOption

if TYPE_CHECKING:
    from moecc.pipeline.passes import Pass


@dataclass(frozen=True)
class PassesRequest:
    """The arguments and options of ``moecc passes``."""

    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", help="Show this pass alone.", autocompletion=complete.passes
        ),
    ] = None
    load: LoadOption = None
    format: FormatOption = Format.human


def passes(request: PassesRequest) -> None:
    """List the passes, or show one: options, types, defaults, before and after."""
    from moecc.cli.console import report
    from moecc.model.open import registry_with

    registry = registry_with(request.load or [])
    if request.name is not None:
        cls = registry.get(request.name)
        report("pass", pass_json(cls), lambda: _one(cls), request.format)
        return
    classes = [registry.get(n) for n in registry.names()]
    data = {"passes": [pass_json(cls) for cls in classes]}
    report("passes", data, lambda: _all(classes), request.format)


def pass_json(cls: type[Pass]) -> dict[str, object]:
    """Return a pass and its options as JSON values."""
    from moecc.pipeline.passes import describe, options

    return {
        "name": cls.name,
        "summary": cls.summary,
        "must_match": cls.must_match,
        "options": [
            {
                "name": option.name,
                "type": describe(option.type),
                "default": None if option.required else option.default,
                "required": option.required,
                "doc": option.doc,
            }
            for option in options(cls).values()
        ],
    }


def _all(classes: list[type[Pass]]) -> str:
    width = max((len(c.name) for c in classes), default=0)
    return "\n".join(f"{c.name:{width}}  {c.summary}" for c in classes)


def _one(cls: type[Pass]) -> str:
    from moecc.pipeline.passes import describe, options, write

    rows = [f"{cls.name}: {cls.summary}", ""]
    for option in options(cls).values():
        default = "required" if option.required else f"default {write(option.type, option.default)}"
        rows.append(f"  {option.name}={describe(option.type)}  ({default})")
        if option.doc:
            rows.append(f"      {option.doc}")
    if not options(cls):
        rows.append("  no options")
    rows += ["", inspect.getdoc(cls) or ""]
    return "\n".join(rows).rstrip()


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    add_command(app, "passes", PassesRequest, passes, "Example: moecc passes upcycle")
