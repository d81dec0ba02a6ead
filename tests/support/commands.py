"""Commands that run in this process."""

from __future__ import annotations

import json
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
