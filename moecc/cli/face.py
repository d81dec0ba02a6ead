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
from typing import TYPE_CHECKING, TypeVar, get_type_hints

import typer

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

R = TypeVar("R", bound="DataclassInstance")


def add_command(
    app: typer.Typer, name: str, request: type[R], command: Callable[[R], int | None], epilog: str
) -> None:
    """Add a command to `app`.

    Args:
      app: the application.
      name: the name of the command.
      request: a dataclass; typer reads its fields.
      command: the function; its return value, unless None, is the exit code.
      epilog: an example, under the help.
    """

    def face(**given: object) -> None:
        code = command(request(**given))
        if code:
            raise typer.Exit(code)

    hints = get_type_hints(request, include_extras=True)
    parameters = [_parameter(f, hints[f.name]) for f in fields(request)]
    face.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    face.__annotations__ = {}
    face.__doc__ = command.__doc__
    app.command(name, epilog=epilog)(face)


def _parameter(field: Field[object], hint: object) -> inspect.Parameter:
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(field.name, kind, default=default, annotation=hint)
