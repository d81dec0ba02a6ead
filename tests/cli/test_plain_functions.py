"""A command is a plain function of one request; typer only makes requests of words."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from moecc.ahead.process import CompileOutcome
from moecc.cli.cmd_compile import CompileRequest, Emit, compile_step
from moecc.cli.cmd_convert import ConvertRequest, convert
from moecc.cli.cmd_import import ImportRequest, import_graph
from moecc.cli.cmd_plan import Via
from moecc.cli.cmd_verify import VerifyRequest, verify
from moecc.cli.console import Format
from moecc.cli.face import add_command
from moecc.cli.main import COMMANDS
from moecc.errors import CheckError

from .conftest import Done

CLI = Path(importlib.import_module("moecc.cli").__path__[0])
LONGEST = 33


def test_a_checkpoint_is_converted_and_verified_without_a_command_line(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sparse"
    convert(ConvertRequest(str(dense), str(out), "upcycle{experts=4 top-k=2}", "mixtral"))
    assert "written to" in capsys.readouterr().out
    verify(VerifyRequest(str(out)))
    assert "match the manifest" in capsys.readouterr().out
    with pytest.raises(CheckError, match="differ by more"):
        verify(VerifyRequest(str(out), against=str(dense), tolerance=0.0, dtype="f32"))


def test_the_same_graph_by_words_and_by_request(
    moecc: Callable[..., Done], dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_words = moecc("import", dense).out
    import_graph(ImportRequest(str(dense)))
    assert capsys.readouterr().out == by_words


@pytest.mark.parametrize("fits", [True, False])
def test_an_exit_code_is_returned_and_becomes_that_of_the_process(
    fits: bool, moecc: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def compile_in_subprocess(request: Any, seconds: float) -> CompileOutcome:
        asked.append((request, seconds))
        return CompileOutcome({"remarks": [], "fits": fits}, program="module")

    monkeypatch.setattr("moecc.ahead.process.compile_in_subprocess", compile_in_subprocess)
    request = CompileRequest("preset:st-moe-base", "cpu:8", emit=Emit.hlo, via=Via.ring)
    assert compile_step(request) == (0 if fits else 1)
    words = ("--emit", "hlo", "--via", "ring", "--time-limit", "5")
    done = moecc("compile", "preset:st-moe-base", "--machine", "cpu:8", *words)
    assert done.code == (0 if fits else 1)
    assert done.out == "module\n"
    (by_request, limit), (by_words, seconds) = asked
    assert by_request == by_words
    assert (by_words.emit, by_words.config.via, by_words.config.remat) == ("hlo", "ring", None)
    assert (limit, seconds) == (3600.0, 5.0)


@dataclass(frozen=True)
class Request:
    what: Annotated[str, typer.Argument(metavar="WHAT")]
    count: Annotated[int, typer.Option("--count", min=1)] = 3
    format: Annotated[Format, typer.Option("--format")] = Format.human


def test_fields_become_arguments_and_options() -> None:
    seen: list[Request] = []

    def count(asked: Request) -> int:
        """Count WHAT."""
        seen.append(asked)
        return asked.count - 3

    app = typer.Typer()
    add_command(app, "count", Request, count, "Example: count sheep")
    command = typer.main.get_command(app)
    assert command.help == "Count WHAT."
    assert command.main(["sheep"], standalone_mode=False) in (None, 0)
    assert command.main(["sheep", "--count", "7", "--format", "json"], standalone_mode=False) == 4
    assert seen == [Request("sheep"), Request("sheep", 7, Format.json)]


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_a_request(name: str) -> None:
    module = importlib.import_module(f"moecc.cli.cmd_{name}")
    request = getattr(module, f"{name.capitalize()}Request")
    assert is_dataclass(request)


def test_no_function_of_the_command_line_is_long() -> None:
    long = {
        f"{file.name}: {node.name}": node.end_lineno - node.lineno + 1
        for file in CLI.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= LONGEST
    }
    assert long == {}
