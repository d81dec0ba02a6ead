"""Generate the usage of each command in ``docs/cli.md`` from its signature and docstring.

    python -m moecc.cli.docs docs/cli.md

replaces the texts between markers; a test checks that the file is current.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from functools import partial

import click

from moecc.cli.commands import Argument, Docstring, command_of, job_function
from moecc.jobs import COMMANDS
from moecc.support.generated_docs import GeneratedPart

WIDTH, USAGE = 100, 86
"""The columns of a line of text, and of a usage, which is shown without scrolling."""

COMMON = ("quiet", "format", "load", "force")
"""Options of most commands, which the page describes once."""


def render_command(name: str) -> str:
    """Return the description of a command, its usage and its examples as Markdown."""
    doc = Docstring.of(job_function(name))
    lines, line = list[str](), f"    moecc {name}"
    for word in _words(name):
        if len(line) + len(word) > USAGE:
            lines.append(line)
            line = "       "
        line += f" {word}"
    examples = [f"    $ {example}" for example in doc.example]
    text = textwrap.fill(" ".join(doc.text.split()), WIDTH, break_on_hyphens=False)
    return "\n".join([text, "", *lines, line, *examples])


def _words(name: str) -> Iterator[str]:
    """Yield the arguments and options of a command as its usage has them, common ones aside."""
    context = click.Context(click.Command(name))
    command = ""  # that another command runs: it stands last
    for parameter in command_of(name).params:
        if isinstance(parameter, Argument):
            words, dashes, command = str(parameter.metavar).partition("-- ")
            yield words.strip()
            command = dashes + command
        elif parameter.name not in COMMON:
            assert isinstance(parameter, click.Option), "the other parameters are options"
            word, value = min(parameter.opts, key=len), parameter.make_metavar(context)
            if isinstance(parameter.type, click.Choice):
                value = "|".join(parameter.type.choices)
            usage = word if parameter.is_flag else f"{word} {value}"
            yield usage if parameter.required else f"[{usage}]"
    if command:
        yield command


MODULE = "moecc.cli.docs"
PARTS = [GeneratedPart(name, MODULE, partial(render_command, name)) for name in COMMANDS]

if __name__ == "__main__":
    sys.exit(max(part.main() for part in PARTS))
