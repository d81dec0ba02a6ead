"""Several processes of a training stop behind the same step where one of them is told to."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moecc.formats.run import saved_steps

from ..train.tiny import make_recipe  # noqa: TID252

pytestmark = pytest.mark.slow
pytest.importorskip("jax")

LIMIT_SECONDS = 300


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def start(folder: Path, port: int, number: int) -> subprocess.Popen[bytes]:
    names = {"COORDINATOR": f"localhost:{port}", "PROCESSES": "2", "PROCESS": str(number)}
    variables = {f"MOECC_{name}": value for name, value in names.items()}
    command = ["train", str(folder / "recipe.toml"), "--out", str(folder / "run")]
    return subprocess.Popen(
        [sys.executable, "-m", "moecc", *command],
        env={**os.environ, **variables, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )


def test_one_signal_stops_both_and_the_same_command_goes_on(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, "steps = 2000\nsave_steps = 5\nkeep = 3")
    recipe.write_text(recipe.read_text() + '\n[mesh]\nmesh = "data=2"\n')
    port, run = free_port(), tmp_path / "run"
    processes = [start(tmp_path, port, number) for number in (0, 1)]
    try:
        limit = time.monotonic() + LIMIT_SECONDS
        while not ((run / "steps").is_dir() and saved_steps(run)):
            assert time.monotonic() < limit
            assert all(process.poll() is None for process in processes)
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGTERM)
        codes = [process.wait(LIMIT_SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [143, 143]
    assert 5 <= saved_steps(run)[-1].number < 2000
