"""Commands that run in this process, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from moecc.cli.main import main


class Done(NamedTuple):
    """A finished command."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the bytes of the files of a folder, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def is_running(pid: int) -> bool:
    """Whether a process has not ended; a zombie has."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state[0] not in "ZX"


class Moecc:
    """``moecc ARGS``, and what it prints."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *args: object) -> Done:
        self.capsys.readouterr()
        code = main([str(a) for a in args])
        done = Done(code, *self.capsys.readouterr())
        assert "Traceback" not in done.err
        return done

    def plan(self, *args: object) -> Any:
        """Return the JSON of a plan."""
        done = self("plan", *args, "--format", "json")
        assert done.code == 0, done.err
        return done.json()
