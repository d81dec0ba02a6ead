"""What a command says besides its artefact: signs of life, notes, and neither under --quiet."""

import io
import threading
from pathlib import Path

from moecc.cli import commands
from moecc.cli.main import main
from moecc.support.console import PROGRESS

GOLDEN = Path(__file__).parents[1] / "golden"


class Terminal(io.StringIO):
    """A stream that somebody watches, and which says when it was written to."""

    def __init__(self, watched):
        super().__init__()
        self.written, self.watched = threading.Event(), watched

    def isatty(self):
        return self.watched

    def write(self, text):
        self.written.set()
        return super().write(text)


def beat(monkeypatch, watched):
    stream = Terminal(watched)
    monkeypatch.delenv(commands.VARIABLE, raising=False)
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(commands, "FIRST_SECONDS", 0.01)
    monkeypatch.setattr(commands, "LINE_SECONDS", (0.01, 60.0))
    with commands.heartbeat("compile", quiet=False):
        assert stream.written.wait(60)
    return stream.getvalue()


def test_quiet_and_commands_that_show_it_themselves_have_none(
    monkeypatch,
):
    monkeypatch.setattr(commands, "LINE_SECONDS", (0.05, 60.0))
    monkeypatch.delenv(commands.VARIABLE, raising=False)
    stream = Terminal(watched=False)
    monkeypatch.setattr("sys.stderr", stream)
    with commands.heartbeat("x", quiet=False):
        PROGRESS.set()
    monkeypatch.setattr(commands, "LINE_SECONDS", (0.0, 60.0))
    with commands.heartbeat("x", quiet=True):
        assert not stream.written.wait(0.05)
    monkeypatch.setenv(commands.VARIABLE, "off")
    with commands.heartbeat("x", quiet=False):
        assert not stream.written.wait(0.05)


def test_quiet_leaves_warnings_and_errors(tmp_path, capsys):
    source, plan = str(GOLDEN / "llama_gqa"), str(tmp_path / "plan.json")
    command = ["plan", source, "--machine", "cpu:8", "--sequence", "64", "--save", plan]
    assert main([*command, "--quiet"]) == 0
    said = capsys.readouterr()
    assert "cpu:8" in said.out
    assert said.err == ""
    assert main([*command, "--force"]) == 0
    assert "the plan is in" in capsys.readouterr().err
    assert main([*command, "--quiet"]) == 1
    assert "--force" in capsys.readouterr().err
    warned = ["convert", source, str(tmp_path / "x"), "-p", "upcycle{experts=300}"]
    assert main([*warned, "--to", "mixtral", "--dry-run", "--quiet"]) == 0
    found = capsys.readouterr().err
    assert found.startswith("warning: ")


def test_a_terminal_has_a_line_that_goes(monkeypatch):
    shown = beat(monkeypatch, watched=True)
    assert shown.startswith("\r\033[Kcompile: 0 s so far\r")
    assert shown.endswith("\r\033[K")
