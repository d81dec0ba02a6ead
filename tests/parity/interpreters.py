"""The interpreters that have transformers, and what is asked of them.

These are the one that runs the tests, if transformers is installed there, and every one that the
environment variable MOECC_PARITY_PYTHON lists (separated as in PATH), say one with version 4 and
one with 5.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def interpreters() -> list[str]:
    listed = [path for path in os.environ.get("MOECC_PARITY_PYTHON", "").split(os.pathsep) if path]
    beside = [sys.executable] if importlib.util.find_spec("transformers") else []
    return [*listed, *beside]


def in_each_interpreter(test):
    """Run `test` with the argument `python` of each interpreter, or skip it where there is none."""
    reason = "transformers is not installed here, and MOECC_PARITY_PYTHON names no other"
    skipped = pytest.mark.skipif(not interpreters(), reason=reason)
    return skipped(pytest.mark.parametrize("python", interpreters() or [sys.executable])(test))


def ask(python: str, probe: str, question):
    """Run the script `probe` of this folder: JSON goes to its input and comes from its output."""
    done = subprocess.run(
        [python, "-W", "ignore", str(Path(__file__).parent / probe)],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def major_of(python: str) -> int:
    """Return the major version of transformers in an interpreter."""
    answer = ask(python, "logits_of.py", [])
    return int(answer["version"].split(".")[0])
