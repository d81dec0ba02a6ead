"""Several processes of a training stop behind the same step where one of them is told to."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moecc.formats.run import saved_steps
from moecc.jobs.launch import free_port
from moecc.launch.processes import ProcessInfo

from ..train.tiny import make_model, make_recipe  # noqa: TID252

pytestmark = pytest.mark.slow
pytest.importorskip("jax")

LIMIT_SECONDS = 300
ROOT = Path(__file__).parents[2]


def start(folder, port, number, count=2, cwd=None):
    """Start one of several processes; the folder of the run is in `cwd`, else beside the recipe."""
    process = ProcessInfo(f"localhost:{port}", count, number)
    command = ["train", str(folder / "recipe.toml"), "--out", "run"]
    return subprocess.Popen(
        [sys.executable, "-m", "moecc", *command],
        env={**os.environ, **process.environment(), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "",
             "PYTHONPATH": str(ROOT)},
        cwd=cwd or folder, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def end(processes):
    """Wait for processes; return the exit code and the messages of each."""
    try:
        texts = [process.communicate(timeout=LIMIT_SECONDS)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, texts, strict=True)]


def test_no_process_of_four_hashes_a_third_of_a_step(tmp_path):
    recipe = make_recipe(tmp_path, 'steps = 1\nsave_steps = 1\n[mesh]\nmesh = "data=4"')
    make_model(tmp_path / "wide", hidden_size=256, intermediate_size=1024)
    recipe.write_text(recipe.read_text().replace('source = "model"', 'source = "wide"'))
    port = free_port()
    for code, text in end([start(tmp_path, port, number, 4) for number in range(4)]):
        assert code == 0, text
    (step,) = saved_steps(tmp_path / "run")
    sizes = [0] * 4
    for name, record in step.facts.files.items():
        # What a process wrote has a folder of its own; the first hashes the remaining files.
        match = re.match(r"ocdbt\.process_(\d)/", name)
        sizes[int(match[1]) if match else 0] += record.size_bytes
    assert max(sizes) <= 0.3 * sum(sizes), sizes


def test_a_folder_that_is_not_shared_is_rejected_though_an_old_one_is_there(tmp_path):
    make_recipe(tmp_path, 'steps = 1\nsave_steps = 1\n[mesh]\nmesh = "data=2"')
    machines = [tmp_path / "machine-0", tmp_path / "machine-1"]
    (machines[1] / "run").mkdir(parents=True)
    machines[0].mkdir()
    port = free_port()
    for code, text in end([start(tmp_path, port, n, cwd=machines[n]) for n in (0, 1)]):
        assert code == 4
        assert "the processes do not share the folder of the run" in text


def test_one_signal_stops_both_and_the_same_command_goes_on(tmp_path):
    make_recipe(tmp_path, 'steps = 2000\nsave_steps = 5\nkeep = 3\n[mesh]\nmesh = "data=2"')
    port, run = free_port(), tmp_path / "run"
    processes = [start(tmp_path, port, number) for number in (0, 1)]
    try:
        limit = time.monotonic() + LIMIT_SECONDS
        while not ((run / "steps").is_dir() and saved_steps(run)):
            assert time.monotonic() < limit
            assert all(process.poll() is None for process in processes)
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGTERM)
    except BaseException:
        for process in processes:
            process.kill()
        raise
    finally:
        codes = [code for code, _ in end(processes)]
    assert codes == [143, 143]
    assert 5 <= saved_steps(run)[-1].number < 2000
