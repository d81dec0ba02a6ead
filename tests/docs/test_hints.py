"""The commands that hints name: each is a command, each option one of it, each pass a pass."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
import typer
from click import Command, Group

from moecc.cli.main import build_app
from moecc.pipeline.registry import installed

from .pages import ROOT

PACKAGES = ("moecc", "passes/moecc_passes", "backends/moecc_backends")

OF_OTHERS = {"--merge": "llama-gguf-split", "--xla_force_host_platform_device_count": "XLA_FLAGS"}
"""Options of other programs, by the word that names the program in the same hint."""

PROSE = {"again", "makes"}
"""What follows the name of the project in a sentence."""


def hints() -> Iterator[tuple[str, str]]:
    """Yield the place and text of each hint; what is filled in when it is raised is ``X``."""
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.keyword) and node.arg == "hint":
                    place = f"{file.relative_to(ROOT)}:{node.value.lineno}"
                    yield from ((place, text) for text in texts(node.value))


def texts(node: ast.expr) -> Iterator[str]:
    """Yield the strings that an expression may be."""
    if isinstance(node, ast.JoinedStr):
        yield "".join(v.value if isinstance(v, ast.Constant) else "X" for v in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from texts(node.body)
        yield from texts(node.orelse)
    elif isinstance(node, ast.BinOp):
        yield "".join((*texts(node.left), *texts(node.right)))


HINTS = [(place, text) for place, text in hints() if re.search(r"moecc [a-z]|--[a-z]|-p ", text)]


def commands() -> dict[str, Command]:
    """Return the commands by name."""
    group = typer.main.get_command(build_app())
    assert isinstance(group, Group)
    return dict(group.commands)


COMMANDS = commands()


def options_of(names: Iterator[str] | list[str]) -> set[str]:
    """Return the options of some commands, and those of every command."""
    own = {o for n in names for p in COMMANDS[n].params for o in (*p.opts, *p.secondary_opts)}
    return own | {"--help", "--quiet"}


def test_there_are_hints_with_commands() -> None:
    assert len(HINTS) >= 40


@pytest.mark.parametrize(("place", "text"), HINTS, ids=[place for place, _ in HINTS])
def test_what_a_hint_names_is_there(place: str, text: str) -> None:
    named = [n for n in re.findall(r"\bmoecc ([a-z][a-z-]*)", text) if n not in PROSE]
    for name in named:
        assert name in COMMANDS, f"{place}: no command moecc {name}"
    # Without a command the hint is about the one that was run: any that raises it.
    known = options_of(list(COMMANDS))
    for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text):
        assert option in known or OF_OTHERS.get(option, "\0") in text, f"{place}: no {option}"
    for command, rest in re.findall(
        r"\bmoecc ([a-z][a-z-]*)((?: [A-Z./…]+| --[a-z][\w-]*)*)", text
    ):
        if command in COMMANDS:
            assert set(re.findall(r"--[a-z][\w-]*", rest)) <= options_of([command]), place
    passes = installed()
    for name in re.findall(r"-p '?([a-z][a-z-]*)", text):
        assert name in passes, f"{place}: no pass {name}"
