"""Several processes on loopback compute what one does, and end together."""

import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from subprocess import PIPE, Popen

import numpy as np
import pytest
from tiers import few

from moecc.cli.main import main

pytest.importorskip("jax")

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "golden"
PROGRAM = HERE / "program.py"
BOUND_SECONDS = 5


def launched(processes, *command, flags=""):
    launch = (sys.executable, "-m", "moecc", "launch", "local", "-n", str(processes), "--")
    return Popen(
        [*launch, *command], env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        stdout=PIPE, stderr=PIPE, text=True,
    )  # fmt: skip


def wait_for(run):
    """Wait for processes, which must print nothing; return what they say."""
    printed, said = run.communicate(timeout=300)
    assert (run.returncode, printed) == (0, ""), said
    return said


def one_process(config, pipeline):
    import jax
    from moecc_backends.xla.backend import function

    from .program import loss_of, model

    graph, params, inputs = model(str(config), pipeline)
    value, gradients = jax.value_and_grad(loss_of(graph))(params, inputs)
    arrays = {f"grad {name}": np.asarray(gradient) for name, gradient in gradients.items()}
    return {"loss": value, "logits": function(graph)(params, inputs)["logits"], **arrays}


CAPACITY = "specialize{mode=train capacity-factor=0.75 groups=1}"
"""Tokens of all processes compete for the slots of an expert."""


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices", "pipeline"), [(2, 2, CAPACITY), (4, 1, "")])
def test_logits_and_gradients_are_those_of_one_process(processes, devices, pipeline, tmp_path):
    config, out = GOLDEN / "mixtral_gqa", tmp_path / "out.npz"
    flags = f"--xla_force_host_platform_device_count={devices}"
    wait_for(launched(processes, "python", PROGRAM, "train", config, pipeline, out, flags=flags))
    expected = one_process(config, pipeline)
    with np.load(out) as arrays:
        assert arrays["counts"].tolist() == [processes, processes * devices]
        assert set(arrays) == {"counts", *expected}
        for name, array in expected.items():
            scale = max(1.0, float(np.abs(array).max(initial=0)))
            np.testing.assert_allclose(arrays[name], array, rtol=0, atol=1e-5 * scale, err_msg=name)
    assert any(np.abs(a).max() > 1e-3 for name, a in expected.items() if "experts" in name)


def test_moecc_run_in_two_processes_writes_what_one_writes(tmp_path):
    tokens, one, two = (str(tmp_path / f"{name}.npy") for name in ("tokens", "one", "two"))
    np.save(tokens, np.random.default_rng(0).integers(0, 37, (4, 6)).astype(np.int32))
    command = ["run", str(GOLDEN / "llama_gqa"), "--inputs", tokens, "--outputs"]
    assert wait_for(launched(2, *command, two)).count("written to") == 1
    assert main([*command, one]) == 0
    np.testing.assert_allclose(np.load(two), np.load(one), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("victim", few([0, 1]))
def test_killing_one_ends_the_others_within_five_seconds(victim):
    run = launched(2, "python", PROGRAM, "hang")
    guard = threading.Timer(120, run.kill)
    guard.start()
    try:
        pids, lines = {}, []
        while len(pids) < 2:
            lines.append(run.stderr.readline())
            assert lines[-1], f"it ended: {''.join(lines)}"
            # Both may write at once, in one line.
            for number, pid in re.findall(r"\[(\d)\] going (\d+)", lines[-1]):
                pids[int(number)] = int(pid)
        start = time.monotonic()
        os.kill(pids[victim], signal.SIGKILL)
        _, errors = run.communicate(timeout=60)
        took = time.monotonic() - start
    finally:
        guard.cancel()
    assert run.returncode == 4
    # The message names the one that died, whatever the other made of it.
    assert f"error: process {victim} of 2 was ended by SIGKILL" in errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())
    assert took < BOUND_SECONDS


def test_differences_name_the_process_and_what():
    from moecc_backends.xla.program import differences

    same = [("dtype", "bf16"), ("jax", "0.10.2")]
    assert list(differences([same, same, same])) == []
    other = [("dtype", "f32"), ("jax", "0.12.0")]
    assert [problem.message for problem in differences([same, same, other])] == [
        "process 2 has another dtype than process 0",
        "process 2 has another jax than process 0",
    ]
