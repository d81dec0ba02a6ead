"""Hints: what they name is there, and what they say works where they are given."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from click import Command, Group

from moecc.cli.main import build_app
from moecc.pipeline.registry import installed

from .pages import ROOT
from .sessions import environment
from .tried_hints import TRIED_HINTS, TriedHint

PACKAGES = ("moecc", "passes/moecc_passes", "backends/moecc_backends")

OF_OTHERS = {"--merge": "llama-gguf-split", "--xla_force_host_platform_device_count": "XLA_FLAGS"}
"""Options of other programs, by the word that names the program in the same hint."""

PROSE = {"again", "makes"}
"""What follows the name of the project in a sentence."""


def hints() -> Iterator[tuple[str, str]]:
    """Yield the place and text of each hint; what is filled in when it is raised is ``X``.

    Those that are given where an error is raised, those that were given a name before, and those
    that a function returns.
    """
    found = {f: ast.parse(f.read_text("utf-8")) for p in PACKAGES for f in (ROOT / p).rglob("*.py")}
    nodes = [(file, node) for file, tree in sorted(found.items()) for node in ast.walk(tree)]
    given = [(file, n.value) for file, n in nodes if isinstance(n, ast.keyword) and n.arg == "hint"]
    named = {name for _, value in given if (name := name_of(value))}
    for file, node in nodes:
        given += ((file, value) for value in named_by(node, named))
    for file, value in given:
        yield from ((f"{file.relative_to(ROOT)}:{value.lineno}", t) for t in texts(value))


def name_of(node: ast.expr) -> str | None:
    """Return the variable, table or function that an expression takes its value from."""
    if isinstance(node, ast.Call):
        node = node.func.value if isinstance(node.func, ast.Attribute) else node.func
    node = node.value if isinstance(node, ast.Subscript) else node
    return node.id if isinstance(node, ast.Name) else None


def named_by(node: ast.AST, names: set[str]) -> Iterator[ast.expr]:
    """Yield what a statement gives one of the names, or returns under it."""
    if isinstance(node, ast.FunctionDef) and node.name in names:
        yield from (n.value for n in ast.walk(node) if isinstance(n, ast.Return) and n.value)
    if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if names & {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}:
            yield node.value


def texts(node: ast.expr) -> Iterator[str]:
    """Yield the strings that an expression may be."""
    if isinstance(node, ast.JoinedStr):
        yield "".join(v.value if isinstance(v, ast.Constant) else "X" for v in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from texts(node.body)
        yield from texts(node.orelse)
    elif isinstance(node, ast.Tuple):
        for each in node.elts:
            yield from texts(each)
    elif isinstance(node, ast.Dict):
        for each in node.values:
            yield from texts(each)
    elif isinstance(node, ast.BinOp):
        yield "".join((*texts(node.left), *texts(node.right)))


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


def is_command(text: str) -> bool:
    """Whether a hint names a command, an option, or an item of a pipeline."""
    named = re.findall(r"\bmoecc ([a-z][a-z-]*)", text)
    return bool(
        set(named) & COMMANDS.keys() or re.search(r"--[a-z]|-p |pip install|[A-Z]{4}=|mkdir", text)
    )


HINTS = [(place, text) for place, text in dict.fromkeys(hints()) if is_command(text)]


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


def test_each_hint_has_a_way_that_is_tried() -> None:
    """But for packages that are to be installed: test_in_a_clone.py."""
    packages = re.compile("pip install [^;]*(;|$)")
    own = [(place, text) for place, text in HINTS if not packages.match(text)]
    left = [
        f"{p}: {text}" for p, text in own if not any(tried.hint in text for tried in TRIED_HINTS)
    ]
    assert left == [], "add rows to tried_hints.py"


@pytest.mark.slow
@pytest.mark.parametrize("tried", TRIED_HINTS, ids=lambda tried: tried.hint[:40])
def test_what_a_hint_says_works(tried: TriedHint, stands: Path, tmp_path: Path) -> None:
    """What was answered with the hint is answered otherwise once it is done."""
    for each in [*stands.iterdir(), ROOT / "tests"]:
        (tmp_path / each.name).symlink_to(each)
    (tmp_path / "notes").unlink()
    shutil.copytree(stands / "notes", tmp_path / "notes")
    failed = shell(tried.fails, tmp_path)
    assert failed.returncode != 0, f"$ {tried.fails}"
    assert tried.hint in " ".join(failed.stderr.split()), (
        f"$ {tried.fails}\n{failed.stderr[-2000:]}"
    )
    done = shell(tried.works, tmp_path)
    said = f"$ {tried.works}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert done.returncode == 0, said


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of a shell, in which `tests` can be imported."""
    path = os.pathsep.join(map(str, (folder, ROOT / "tests" / "support")))
    environ = {**environment(), "PYTHONPATH": path}
    return subprocess.run(
        ["/bin/sh", "-c", line], cwd=folder, env=environ, capture_output=True, text=True
    )
