"""Requests to a store fail, last too long, end early: one message, and nothing is half-visible."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PACKAGES = ("s3fs", "moto", "orbax")  # imported by the command alone

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not all(map(find_spec, PACKAGES)), reason="a package is missing")
def test_faults_of_a_store_are_one_message_and_nothing_is_lost(tmp_path):
    out = tmp_path / "faults.json"
    command = [sys.executable, "-m", "tests.proof.stores", "--sample", "1", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "support")}
    done = subprocess.run(
        [*command, "--command", "convert", "push --force", "verify"], cwd=ROOT, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads(out.read_text())
    assert all(sum(r["faults"].values()) >= 12 for r in records.values())
