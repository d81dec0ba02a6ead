"""What a command says besides its artefact: signs of life, notes, and neither under --quiet."""

import io
import threading

from moecc.cli import commands
from moecc.support.console import PROGRESS

from .conftest import LLAMA


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


def open_terminal(monkeypatch, watched):
    """Let a stream stand for standard error, with signs of life."""
    stream = Terminal(watched)
    monkeypatch.delenv(commands.VARIABLE, raising=False)
    monkeypatch.setattr("sys.stderr", stream)
    return stream


def test_quiet_and_commands_that_show_it_themselves_have_none(monkeypatch):
    stream = open_terminal(monkeypatch, watched=False)
    monkeypatch.setattr(commands, "LINE_SECONDS", (0.05, 60.0))
    with commands.heartbeat("x", quiet=False):
        PROGRESS.set()
    monkeypatch.setattr(commands, "LINE_SECONDS", (0.0, 60.0))
    with commands.heartbeat("x", quiet=True):
        assert not stream.written.wait(0.05)
    monkeypatch.setenv(commands.VARIABLE, "off")
    with commands.heartbeat("x", quiet=False):
        assert not stream.written.wait(0.05)


def test_quiet_leaves_warnings_and_errors(tmp_path, cli):
    plan = tmp_path / "plan.json"
    command = ("plan", LLAMA, "--machine", "cpu:8", "--sequence", "64", "--save", plan)
    done = cli(*command, "--quiet")
    assert "cpu:8" in done.out
    assert done.err == ""
    cli(*command, "--force", says="the plan is in")
    cli(*command, "--quiet", code=1, says="--force")
    more = ("--dry-run", "--quiet")
    done = cli.convert(LLAMA, tmp_path / "x", *more, pipeline="upcycle{experts=300}")
    assert done.err.startswith("warning: ")


def test_a_terminal_has_a_line_that_goes(monkeypatch):
    stream = open_terminal(monkeypatch, watched=True)
    monkeypatch.setattr(commands, "FIRST_SECONDS", 0.01)
    with commands.heartbeat("compile", quiet=False):
        assert stream.written.wait(60)
    assert stream.getvalue().startswith("\r\033[Kcompile: 0 s so far\r")
    assert stream.getvalue().endswith("\r\033[K")
