"""Processes, the compilers beside them, and meshes that do not divide."""

import os
import signal
import subprocess
import time

import numpy as np
import pytest
from moecc_backends.xla import ahead as topology

import moecc
from moecc.errors import InputError, MachineError
from moecc.plan.machines import parse_machine
from moecc.support.process import signals_noted
from tests.support.commands import is_running

from .conftest import LLAMA, MOECC, run_process

LAUNCH = (*MOECC, "launch", "local", "-n", "2", "--", "python")

SLEEPER = """
import os, sys, time
open(os.path.join(sys.argv[1], str(os.getpid())), "w").close()
time.sleep(300)
"""


def wait_until(condition, seconds=60):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)], ids=["SIGKILL", "SIGTERM"]
)
def test_a_launched_program_ends_with_its_supervisor(tmp_path, number, code):
    program, pids = tmp_path / "sleeper.py", tmp_path / "pids"
    program.write_text(SLEEPER)
    pids.mkdir()
    launched = subprocess.Popen([*LAUNCH, program, pids], stderr=subprocess.DEVNULL)
    wait_until(lambda: len(os.listdir(pids)) == 2)
    launched.send_signal(number)
    assert launched.wait(timeout=30) == code
    wait_until(lambda: not any(is_running(int(pid)) for pid in os.listdir(pids)))


def test_copies_that_never_join_are_reported(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import sys\nprint(sys.argv, __name__)\n")
    done = run_process(*LAUNCH, program, "--flag")
    assert done.stdout == f"['{program}', '--flag'] __main__\n"
    assert done.stderr.count("the program did not join: 2 copies of it ran, each for itself") == 1


def test_the_compiling_process_ends_with_its_parent(tmp_path):
    (tmp_path / "jax.py").write_text(  # which only the compiling process imports
        "import os, time\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "time.sleep(300)\n"
    )
    command = [*MOECC, "compile", "preset:smollm2-135m", "--machine", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    parent = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    pid = tmp_path / "pid"
    wait_until(lambda: pid.exists() and pid.read_text())
    worker = int(pid.read_text())
    assert is_running(worker)
    parent.kill()
    assert parent.wait(timeout=30) == -9
    wait_until(lambda: not is_running(worker), 20)


OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "code", "words"),
    [
        ({}, 2, "no cluster is found in the environment"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, 2, "no cluster is found in the environment"),
        (OPEN_MPI, 4, "process 0 was not met within 1 s"),
    ],
    ids=["no cluster", "half of one", "a peer that never comes"],
)
def test_outside_a_cluster_nothing_aborts_in_jax(tmp_path, variables, code, words):
    cluster = {"MOECC_DISTRIBUTED": "cluster", "MOECC_JOIN_SECONDS": "1", **variables}
    command = (*MOECC, "run", LLAMA, "--outputs", tmp_path / "o.npy")
    assert words in run_process(*command, code=code, **cluster).stderr


@pytest.mark.parametrize(("installed", "fits"), [("0.0.42.1", True), ("0.0.52", False)])
def test_a_libtpu_that_does_not_fit_jax_is_named(monkeypatch, installed, fits):
    versions = {"libtpu": installed, "jax": "0.10.2"}
    monkeypatch.setattr("importlib.metadata.version", versions.__getitem__)
    monkeypatch.setattr(topology, "version", versions.__getitem__, raising=False)
    asked = ["jaxlib<=0.10.2,>=0.10.2; extra == 'tpu'", 'libtpu==0.0.42.*; extra == "tpu"']
    monkeypatch.setattr(topology, "requires", lambda name: asked, raising=False)
    monkeypatch.setattr(topology, "find_spec", lambda name: object())
    machine = parse_machine("tpu:v5p:2x2x1")
    if fits:
        topology.require(machine)
        return
    with pytest.raises(MachineError, match=r"libtpu 0\.0\.52 does not fit jax 0\.10\.2.*0\.0\.42"):
        topology.require(machine)


def test_a_sequence_that_the_mesh_does_not_divide_is_reported():
    from moecc_backends.xla.lower.function import device_mesh, sharded_function

    pipeline = "annotate-sharding{mesh=model:2 rules=sequence-parallel},lower-collectives"
    graph = moecc.open(LLAMA).apply(pipeline).graph
    run = sharded_function(graph, device_mesh(graph))
    params = {n: np.ones(v.type.shape, "f") for n, v in graph.params.items()}
    with pytest.raises(InputError) as caught:
        run(params, {"tokens": np.zeros((24, 5), np.int32)})
    problem = caught.value.problems[0]
    assert "does not divide the axis seq" in problem.message
    assert (problem.where, problem.found) == ("%tokens", "5")


def test_the_first_signal_is_answered_and_the_second_raises(capfd):
    with signals_noted("finishing") as noted:
        os.kill(os.getpid(), signal.SIGINT)
        assert noted.signal is signal.SIGINT
        assert capfd.readouterr().err == "\nfinishing\n"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
