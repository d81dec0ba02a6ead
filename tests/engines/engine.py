"""The interpreters that have an engine, and how its probe is run.

Engines stay out of the environment of the tests: each is asked in the interpreter that an
environment variable names, ``MOECC_LLAMA_CPP_PYTHON`` for one with ``llama-cpp-py-sync``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def interpreter(variable: str, module: str) -> str | None:
    """Return the interpreter that has `module`, or None."""
    named = os.environ.get(variable)
    return named or (sys.executable if importlib.util.find_spec(module) else None)


def needs(variable: str, module: str) -> pytest.MarkDecorator:
    """Return the mark of tests that skip where no interpreter has `module`."""
    reason = f"{variable} names no interpreter with {module}"
    return pytest.mark.skipif(interpreter(variable, module) is None, reason=reason)


def ask(python: str, probe: str, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run the script `probe` of this folder; return what it says of each job."""
    done = subprocess.run(
        [python, "-W", "ignore", str(Path(__file__).parent / probe)],
        input=json.dumps(jobs), capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])["reports"]
