"""Programs compiled for machines that are not there, and the count of what they do."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jax")

from moecc_backends.xla.aot.topology import missing

from moecc.plan.machines import parse_machine

from .probe import BATCH, DATA, EMBED, LAYERS, MLP, MODEL, SEQ

MACHINES = [
    "cpu:8",
    pytest.param("tpu:v5p:2x2x2", marks=pytest.mark.slow),
    pytest.param("tpu:v6e:2x4", marks=pytest.mark.slow),
    pytest.param("gpu:h100:8", marks=pytest.mark.slow),
]


@functools.cache
def probed(machine: str) -> dict[str, Any]:
    why = missing(parse_machine(machine).kind)
    if why is not None:
        pytest.skip(why)
    script = Path(__file__).parent / "probe.py"
    code = f"import runpy; runpy.run_path({str(script)!r}, run_name='probe')['main']({machine!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("machine", MACHINES)
def test_products_are_counted_as_often_as_the_loop_runs(machine: str) -> None:
    # Two products a layer, and for each two of its gradient.
    product = 2 * (BATCH // DATA) * SEQ * EMBED * (MLP // MODEL)
    assert probed(machine)["flops"] == 6 * product * LAYERS
    assert probed(machine)["unknown_loops"] == 0


@pytest.mark.parametrize("machine", MACHINES)
def test_exchanges_are_counted_as_often_as_the_loop_runs(machine: str) -> None:
    found = probed(machine)["collectives"]["all-to-all"]
    # Two a layer, and two of the gradient, of the tokens of one device; XLA may keep more in the
    # loop than it must, and a CPU moves bfloat16 as float32.
    least = (BATCH // DATA) * SEQ * EMBED * 2 * 4 * LAYERS
    assert found["runs"] >= 4 * LAYERS
    assert least <= found["bytes"] <= 6 * least
    assert ["all-to-all", DATA] in probed(machine)["group_sizes"]
    assert ["all-reduce", MODEL] in probed(machine)["group_sizes"]


@pytest.mark.parametrize("machine", MACHINES)
def test_memory_is_told_by_kind(machine: str) -> None:
    memory = probed(machine)["memory"]
    weights = 2 * LAYERS * EMBED * (MLP // MODEL) * 2
    tokens = (BATCH // DATA) * SEQ * EMBED * 2
    assert memory["arguments_bytes"] == weights + tokens
    assert weights <= memory["outputs_bytes"] <= weights + 1024
    # What lies in the fast memory of a TPU counts as no temporary, but takes part in the peak.
    assert memory["peak_bytes"] > memory["arguments_bytes"] + memory["outputs_bytes"]
    assert probed(machine)["host_peak_bytes"] > 2**27
