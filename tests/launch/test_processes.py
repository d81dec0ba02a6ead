"""Several processes on loopback compute what one does, and end together."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from tiers import few

pytest.importorskip("jax")

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "golden"
PROGRAM = HERE / "program.py"
BOUND_SECONDS = 5


def launched(processes, *command, env=None, more=()):
    words = [sys.executable, "-m", "moecc", "launch", "local", "-n", str(processes), *more, "--"]
    clean = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.Popen(
        [*words, *map(str, command)],
        env={**clean, "JAX_PLATFORMS": "cpu", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def one_process(config, pipeline):
    import jax
    from moecc_backends.xla.backend import function

    from .program import loss_of, model

    graph, params, inputs = model(str(config), pipeline)
    value, gradients = jax.value_and_grad(loss_of(graph))(params, inputs)
    found = {f"grad {n}": np.asarray(g) for n, g in gradients.items()}
    return {"loss": value, "logits": function(graph)(params, inputs)["logits"], **found}


CAPACITY = "specialize{mode=train capacity-factor=0.75 groups=1}"
"""Tokens of all processes compete for the slots of an expert."""


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices", "pipeline"), [(2, 2, CAPACITY), (4, 1, "")])
def test_logits_and_gradients_are_those_of_one_process(processes, devices, pipeline, tmp_path):
    config, out = GOLDEN / "mixtral_gqa", tmp_path / "out.npz"
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    run = launched(processes, "python", PROGRAM, "train", config, pipeline, out, env=flags)
    printed, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    assert printed == ""
    expected = one_process(config, pipeline)
    with np.load(out) as found:
        assert found["counts"].tolist() == [processes, processes * devices]
        assert set(found) == {"counts", *expected}
        for name, array in expected.items():
            scale = max(1.0, float(np.abs(array).max(initial=0)))
            np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5 * scale, err_msg=name)
    assert any(np.abs(expected[f"grad {n}"]).max() > 1e-3 for n in _experts(expected))


def _experts(arrays):
    return [n.removeprefix("grad ") for n in arrays if "experts" in n]


def test_moecc_run_in_two_processes_writes_what_one_writes(tmp_path):
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.random.default_rng(0).integers(0, 37, (4, 6)).astype(np.int32))
    args = ["run", str(GOLDEN / "llama_gqa"), "--inputs", str(tokens), "--outputs"]
    run = launched(2, *args, tmp_path / "two.npy")
    printed, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    assert printed == ""
    assert errors.count("written to") == 1
    from moecc.cli.main import main

    assert main([*args, str(tmp_path / "one.npy")]) == 0
    one, two = np.load(tmp_path / "one.npy"), np.load(tmp_path / "two.npy")
    np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-5)


def read_until(stream, pattern, count):
    """Return what matched `count` times, and the lines up to there."""
    found = []
    lines = []
    for line in stream:
        lines.append(line)
        found += re.findall(pattern, line)
        if len(found) == count:
            return found, lines
    raise AssertionError(f"it ended: {''.join(lines)}")


@pytest.mark.parametrize("victim", few([0, 1]))
def test_killing_one_ends_the_others_within_five_seconds(victim):
    run = launched(2, "python", PROGRAM, "hang")
    guard = threading.Timer(120, run.kill)
    guard.start()
    try:
        assert run.stderr is not None
        going, _ = read_until(run.stderr, r"\[(\d)\] going (\d+)", 2)
        pids = {int(number): int(pid) for number, pid in going}
        start = time.monotonic()
        os.kill(pids[victim], signal.SIGKILL)
        _, errors = run.communicate(timeout=60)
        took = time.monotonic() - start
    finally:
        guard.cancel()
    assert run.returncode == 4
    # The message names the one that died, whatever the other made of it.
    assert re.search(rf"error: process {victim} of 2 was ended by SIGKILL", errors)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())
    assert took < BOUND_SECONDS


def test_differences_name_the_process_and_what():
    from moecc_backends.xla.program import differences

    same = [("dtype", "bf16"), ("jax", "0.10.2")]
    assert list(differences([same, same, same])) == []
    other = [("dtype", "f32"), ("jax", "0.12.0")]
    found = list(differences([same, same, other]))
    assert [p.message for p in found] == [
        "process 2 has another dtype than process 0",
        "process 2 has another jax than process 0",
    ]
