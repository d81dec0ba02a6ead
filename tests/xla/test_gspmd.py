"""A training step on a mesh is the training step, and moves what its layout says."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jax")
pytest.importorskip("optax")

CASES = [
    ("data=4,model=2", "whole", "full", "gspmd"),
    ("data=8", "split", "none", "gspmd"),
    ("fsdp=2,expert=2,model=2", "whole", "save", "gspmd"),
    ("data=2,expert=4", "split", "unrolled", "gspmd"),
    ("data=4,model=2", "split", "full", "capacity"),
    ("fsdp=2,expert=2,model=2", "split", "save", "ring"),
]
"""The mesh, the weights of no expert, what is computed again, and who exchanges rows: XLA's
partitioner, or the graph by the way that is named."""


@functools.cache
def probed(*case: str) -> dict[str, Any]:
    script = Path(__file__).parent / "gspmd_probe.py"
    done = subprocess.run(
        [sys.executable, str(script), *case], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_a_step_on_a_mesh_is_the_step_on_one_device(case: tuple[str, ...]) -> None:
    found = probed(*case)
    alone, together = found["loss"]
    assert together == pytest.approx(alone, rel=1e-9)
    # Parameters are float32, and so is what is added to them.
    assert found["worst"] < 1e-5
    assert found["unmoved"] == []
    assert found["auxiliary"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if c[3] != "ring"], ids=" ".join)
def test_rows_are_exchanged_and_experts_are_not_gathered(case: tuple[str, ...]) -> None:
    found = probed(*case)
    # Two exchanges a layer, two of the gradient, and two again where all is computed again.
    passes = 6 if case[2] in ("full", "save") else 4
    assert found["collectives"]["all-to-all"]["runs"] >= 4 * passes
    # The parts of one expert layer on a device, in float64.
    layer_bytes = 3 * 8 * 64 * 32 * 8
    assert found["largest_gather_bytes"] < layer_bytes / 4
