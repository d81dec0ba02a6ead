"""Generate the options of each command in ``docs/cli.md`` from its signature and docstring.

    python -m moecc.cli.docs docs/cli.md

replaces the texts between markers; a test checks that the file is current.
"""

from __future__ import annotations

import sys
from functools import partial

import click

from moecc.cli.commands import Argument, Docstring, command_of, job_function
from moecc.jobs import COMMANDS
from moecc.support.generated_docs import GeneratedPart


def render_command(name: str) -> str:
    """Return the description of a command, its arguments and its options as Markdown."""
    context = click.Context(click.Command(name))
    doc, command = Docstring.of(job_function(name)), command_of(name)
    rows = []
    for parameter in command.params:
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
        rows.append(f"| {_cell(spelling)} | {_cell(help)} |")
    examples = [f"    {line}" for line in doc.example]
    return "\n".join([doc.text, "", "| parameter | |", "|---|---|", *rows, "", *examples])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


MODULE = "moecc.cli.docs"
PARTS = [GeneratedPart(name, MODULE, partial(render_command, name)) for name in COMMANDS]

if __name__ == "__main__":
    sys.exit(max(part.main() for part in PARTS))
