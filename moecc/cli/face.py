"""Commands from dataclasses and functions: fields become options, return values exit codes.

A command is a plain function of one request, which a test or a notebook calls directly::

    convert(ConvertRequest("SmolLM2-135M", "out", "upcycle{experts=8}", "mixtral"))

A field is an argument or an option of the command line, as annotated; its default is the
option's.  The docstring of the function is the help.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import TYPE_CHECKING, Annotated, TypeVar, get_type_hints

import typer

from moecc.cli.console import quietly
from moecc.cli.heartbeat import Heartbeat, Progress

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_QUIET = inspect.Parameter(
    "quiet",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option("--quiet", help="Only warnings and errors besides.")],
)

R = TypeVar("R", bound="DataclassInstance")


def add_command(
    app: typer.Typer,
    name: str,
    request: type[R],
    command: Callable[[R], int | None],
    epilog: str,
    *,
    progress: Progress = Progress.NONE,
) -> None:
    """Add a command to `app`; every one takes ``--quiet``.

    Args:
      app: the application.
      name: the name of the command.
      request: a dataclass; typer reads its fields.
      command: the function; its return value, unless None, is the exit code.
      epilog: an example, under the help.
      progress: what it shows itself of how it goes.
    """

    def face(*, quiet: bool, **given: object) -> None:
        with quietly(quiet), Heartbeat(name, progress, quiet=quiet):
            code = command(request(**given))
        if code:
            raise typer.Exit(code)

    hints = get_type_hints(request, include_extras=True)
    parameters = [*(_parameter(f, hints[f.name]) for f in fields(request)), _QUIET]
    face.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    face.__annotations__ = {}
    face.__doc__ = command.__doc__
    app.command(name, epilog=epilog)(face)


def _parameter(field: Field[object], hint: object) -> inspect.Parameter:
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(field.name, kind, default=default, annotation=hint)
