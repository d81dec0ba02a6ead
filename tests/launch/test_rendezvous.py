"""Processes meet before JAX's client starts, whose C++ ends a process that waits in vain."""

import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moecc.errors import MachineError
from moecc.jobs.launch import free_port
from moecc.launch.processes import JOIN, ProcessInfo, meet

LLAMA = Path(__file__).parent.parent / "golden" / "llama_gqa"


def started(places, seconds):
    threads = ThreadPoolExecutor(len(places))
    made = [threads.submit(meet, process, seconds) for process in places]
    threads.shutdown(wait=False)
    return made


def problem_of(future):
    error = future.exception(timeout=30)
    assert isinstance(error, MachineError), error
    return str(error)


def test_all_meet_in_any_order_and_leave_the_port_free():
    port = free_port()
    address = f"127.0.0.1:{port}"
    others = started([ProcessInfo(address, 4, n) for n in (3, 1, 2)], 30)
    time.sleep(0.3)
    assert not any(future.done() for future in others)
    meet(ProcessInfo(address, 4, 0), 30)
    for future in others:
        assert future.result(timeout=30) is None
    # JAX listens there next, on all interfaces.
    with socket.create_server(("", port)):
        pass


def test_one_that_never_comes_is_named_to_all_that_came():
    address = f"127.0.0.1:{free_port()}"
    start = time.monotonic()
    came = started([ProcessInfo(address, 4, n) for n in (0, 2)], 0.8)
    for problem in map(problem_of, came):
        assert "processes 1, 3 of 4 did not come within 0.8 s" in problem
        assert JOIN in problem
    assert time.monotonic() - start < 10


def test_without_the_first_the_others_end():
    address = f"127.0.0.1:{free_port()}"
    (one,) = started([ProcessInfo(address, 2, 1)], 0.5)
    problem = problem_of(one)
    assert "process 0 was not met within 0.5 s" in problem
    assert "refused" in problem


def test_one_that_came_and_went_is_waited_for():
    port = free_port()
    (first,) = started([ProcessInfo(f"127.0.0.1:{port}", 2, 0)], 30)
    with connected(port) as gone:
        gone.sendall(b"moecc 1 of 3\n")
        assert b"was told of 3 processes" in gone.recv(100)
    with connected(port) as gone:
        gone.sendall(b"moecc 1 of")
    time.sleep(0.2)
    assert not first.done()
    meet(ProcessInfo(f"127.0.0.1:{port}", 2, 1), 30)
    assert first.result(timeout=30) is None


def connected(port):
    limit = time.monotonic() + 30
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=30)
        except OSError:
            assert time.monotonic() < limit
            time.sleep(0.02)


@pytest.mark.parametrize(
    "said",
    [b"GET / HTTP/1.1\r\n\r\n", b"moecc 7 of 2\n"],
)
def test_strangers_are_not_counted(said):
    port = free_port()
    (first,) = started([ProcessInfo(f"127.0.0.1:{port}", 2, 0)], 0.6)
    with connected(port) as stranger:
        stranger.sendall(said)
        with pytest.raises(MachineError):
            first.result(timeout=30)


def test_two_with_one_number_and_two_counts_are_told():
    address = f"127.0.0.1:{free_port()}"
    (first,) = started([ProcessInfo(address, 3, 0)], 2.5)
    (one,) = started([ProcessInfo(address, 3, 1)], 30)
    time.sleep(0.5)
    (twin,) = started([ProcessInfo(address, 3, 1)], 30)
    assert "two processes with the number 1" in problem_of(twin)
    (other,) = started([ProcessInfo(address, 2, 1)], 30)
    assert "process 1 was told of 2 processes, process 0 of 3" in problem_of(other)
    for future in (first, one):
        assert "process 2 of 3 did not come" in problem_of(future)


def test_what_is_no_process_of_moecc_is_told():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (one,) = started([ProcessInfo(f"127.0.0.1:{port}", 2, 1)], 1)
        threading.Thread(target=_serve, args=(server,), daemon=True).start()
        assert "that is not moecc answers" in problem_of(one)


def _serve(server):
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        with connection:
            connection.sendall(b"HTTP/1.1 400 Bad Request\n")


def test_an_address_in_use_is_told():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(MachineError, match="the first process cannot listen"):
            meet(ProcessInfo(f"127.0.0.1:{port}", 2, 0), 1)


def test_a_run_ends_with_a_message_when_the_other_never_comes(tmp_path):
    pytest.importorskip("jax")
    process = ProcessInfo(f"127.0.0.1:{free_port()}", 2, 0)
    out = tmp_path / "logits.npy"
    done = subprocess.run(
        [sys.executable, "-m", "moecc", "run", LLAMA, "--outputs", out],
        env={**os.environ, "JAX_PLATFORMS": "cpu", JOIN: "1", **process.environment()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 4, done.stderr
    assert "error: 127.0.0.1" in done.stderr
    assert "the processes did not meet" in done.stderr
    assert "Terminating" not in done.stderr
    assert not out.exists()
