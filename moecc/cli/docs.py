"""Generate the options of each command in ``docs/cli.md`` from its signature and docstring.

    python -m moecc.cli.docs docs/cli.md

replaces the texts between markers; a test checks that the file is current.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache, partial

import click

from moecc.cli.commands import Argument, Docstring, command_of, job_function
from moecc.jobs import COMMANDS
from moecc.support.generated_docs import GeneratedPart

SHARED_BY = 3
"""The number of commands from which on the page lists an option once, for all of them."""

_OPTION = re.compile(r"`?(--?[a-z-]+)")


def render_command(name: str) -> str:
    """Return the description of a command, its arguments and its options as Markdown."""
    doc, shared = Docstring.of(job_function(name)), shared_rows()
    rows = list(_rows(name))
    common = ", ".join(f"`{_OPTION.findall(row[0])[0]}`" for row in rows if row in shared)
    items = _list(row for row in rows if row not in shared)
    items += f"\n* [Common options](#common-options): {common}." if common else ""
    examples = "\n".join(f"    {line}" for line in doc.example)
    return "\n\n".join([doc.text, examples, items])


def render_shared() -> str:
    """Return the options that several commands have alike, as Markdown."""
    return _list(sorted(shared_rows(), key=lambda row: row[0].lstrip("`-")))


@cache
def shared_rows() -> frozenset[tuple[str, str]]:
    """Return the spelling and the help of the options that several commands have alike."""
    counts = Counter(row for name in COMMANDS for row in _rows(name) if _OPTION.match(row[0]))
    return frozenset(row for row, count in counts.items() if count >= SHARED_BY)


def _rows(name: str) -> Iterator[tuple[str, str]]:
    """Yield the spelling and the help of each parameter of a command, ``--quiet`` aside."""
    context = click.Context(click.Command(name))
    for parameter in command_of(name).params:
        if isinstance(parameter, Argument):
            spelling = f"`{parameter.metavar}`"
        else:
            assert isinstance(parameter, click.Option), "the other parameters are options"
            if parameter.name == "quiet":  # which the page describes once
                continue
            words = sorted(parameter.opts, key=len)
            value = "" if parameter.is_flag else f" {parameter.make_metavar(context)}"
            spelling = ", ".join(f"`{word}`" for word in [*words[:-1], f"{words[-1]}{value}"])
        help = getattr(parameter, "help", "")
        if getattr(parameter, "show_default", False):
            help = f"{help} Default: `{parameter.default}`."
        yield spelling, help


def _list(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"* {spelling}: {help}" for spelling, help in rows)


MODULE = "moecc.cli.docs"
PARTS = [
    GeneratedPart("shared", MODULE, render_shared),
    *(GeneratedPart(name, MODULE, partial(render_command, name)) for name in COMMANDS),
]

if __name__ == "__main__":
    sys.exit(max(part.main() for part in PARTS))
