"""Requests to a store fail, last too long, end early: one message, and nothing is half-visible."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")
pytest.importorskip("orbax.checkpoint")

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
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
