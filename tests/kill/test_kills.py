"""A conversion that is ended at any write, synchronisation or rename can be continued."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def prove(*options: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill.prove", *options],
        capture_output=True, text=True, timeout=3000, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_some_points() -> None:
    found = prove("--sample", "3", "--how", "power some")
    assert found["failures"] == []
    assert found["killed"] == 21


@pytest.mark.slow
def test_every_point() -> None:
    found = prove()
    assert found["failures"] == []
    assert found["points"]["kill: out fresh"] > 100
    assert found["points"]["power all: out --force"] > 100
