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


@pytest.fixture
def address():
    return f"127.0.0.1:{free_port()}"


def start(address, count, *numbers, seconds=30):
    """Let processes with these numbers, of so many, meet at an address."""
    threads = ThreadPoolExecutor(len(numbers))
    processes = [ProcessInfo(address, count, number) for number in numbers]
    futures = [threads.submit(meet, process, seconds) for process in processes]
    threads.shutdown(wait=False)
    return futures


def problem_of(future):
    error = future.exception(timeout=30)
    assert isinstance(error, MachineError), error
    return str(error)


def test_all_meet_in_any_order_and_leave_the_port_free(address):
    others = start(address, 4, 3, 1, 2)
    time.sleep(0.3)
    assert not any(future.done() for future in others)
    meet(ProcessInfo(address, 4, 0), 30)
    for future in others:
        assert future.result(timeout=30) is None
    # JAX listens there next, on all interfaces.
    with socket.create_server(("", port_of(address))):
        pass


def test_one_that_never_comes_is_named_to_all_that_came(address):
    begin = time.monotonic()
    for problem in map(problem_of, start(address, 4, 0, 2, seconds=0.8)):
        assert "processes 1, 3 of 4 did not come within 0.8 s" in problem
        assert JOIN in problem
    assert time.monotonic() - begin < 10


def test_without_the_first_the_others_end(address):
    (second,) = start(address, 2, 1, seconds=0.5)
    problem = problem_of(second)
    assert "process 0 was not met within 0.5 s" in problem
    assert "refused" in problem


def test_one_that_came_and_went_is_waited_for(address):
    (first,) = start(address, 2, 0)
    with connect(address) as gone:
        gone.sendall(b"moecc 1 of 3\n")
        assert b"was told of 3 processes" in gone.recv(100)
    with connect(address) as gone:
        gone.sendall(b"moecc 1 of")
    time.sleep(0.2)
    assert not first.done()
    meet(ProcessInfo(address, 2, 1), 30)
    assert first.result(timeout=30) is None


def port_of(address):
    return int(address.rpartition(":")[2])


def connect(address):
    limit = time.monotonic() + 30
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port_of(address)), timeout=30)
        except OSError:
            assert time.monotonic() < limit
            time.sleep(0.02)


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", b"moecc 7 of 2\n"])
def test_strangers_are_not_counted(address, said):
    (first,) = start(address, 2, 0, seconds=0.6)
    with connect(address) as stranger:
        stranger.sendall(said)
        with pytest.raises(MachineError):
            first.result(timeout=30)


def test_two_with_one_number_and_two_counts_are_told(address):
    (first,) = start(address, 3, 0, seconds=2.5)
    (second,) = start(address, 3, 1)
    time.sleep(0.5)
    (twin,) = start(address, 3, 1)
    assert "two processes with the number 1" in problem_of(twin)
    (other,) = start(address, 2, 1)
    assert "process 1 was told of 2 processes, process 0 of 3" in problem_of(other)
    for future in (first, second):
        assert "process 2 of 3 did not come" in problem_of(future)


def test_what_is_no_process_of_moecc_is_told():
    with socket.create_server(("127.0.0.1", 0)) as server:
        (second,) = start(f"127.0.0.1:{server.getsockname()[1]}", 2, 1, seconds=1)
        threading.Thread(target=_serve, args=(server,), daemon=True).start()
        assert "that is not moecc answers" in problem_of(second)


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
        (first,) = start(f"127.0.0.1:{server.getsockname()[1]}", 2, 0, seconds=1)
        assert "the first process cannot listen" in problem_of(first)


def test_a_run_ends_with_a_message_when_the_other_never_comes(address, tmp_path):
    pytest.importorskip("jax")
    process = ProcessInfo(address, 2, 0)
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
