"""Processes, the compilers beside them, and meshes that do not divide."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from moecc_backends.xla import ahead as topology

from moecc.errors import InputError, MachineError
from moecc.plan.machines import parse_machine
from moecc.support.process import signals_noted
from tests.support.commands import is_running

GOLDEN = Path(__file__).parent.parent / "golden"
LAUNCH = [sys.executable, "-m", "moecc", "launch", "local", "-n", "2", "--", "python"]

SLEEPER = """
import os, sys, time
open(os.path.join(sys.argv[1], str(os.getpid())), "w").close()
time.sleep(300)
"""


def wait_until(condition, seconds=60):
    assert callable(condition)
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        ("SIGKILL", -9),
        ("SIGTERM", 143),
    ],
)
def test_a_launched_program_ends_with_its_supervisor(tmp_path, number, code):
    program, pids = tmp_path / "sleeper.py", tmp_path / "pids"
    program.write_text(SLEEPER)
    pids.mkdir()
    launched = subprocess.Popen([*LAUNCH, str(program), str(pids)], stderr=subprocess.DEVNULL)
    wait_until(lambda: len(os.listdir(pids)) == 2)
    launched.send_signal(getattr(signal, number))
    assert launched.wait(timeout=30) == code
    wait_until(lambda: not any(is_running(int(pid)) for pid in os.listdir(pids)))


def test_copies_that_never_join_are_reported(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import sys\nprint(sys.argv, __name__)\n")
    done = subprocess.run(
        [*LAUNCH, str(program), "--flag"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert done.stdout == f"['{program}', '--flag'] __main__\n"
    assert done.stderr.count("the program did not join: 2 copies of it ran, each for itself") == 1


def test_the_compiling_process_ends_with_its_parent(tmp_path):
    (tmp_path / "jax.py").write_text(  # which only the compiling process imports
        "import os, time\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "time.sleep(300)\n"
    )
    command = [sys.executable, "-m", "moecc", "compile", "preset:smollm2-135m", "--machine", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    parent = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    pid = tmp_path / "pid"
    wait_until(lambda: pid.exists() and pid.read_text())
    worker = int(pid.read_text())
    assert is_running(worker)
    parent.kill()
    assert parent.wait(timeout=30) == -9
    wait_until(lambda: not is_running(worker), 20)


@pytest.mark.parametrize(
    ("variables", "code", "words"),
    [
        ({}, 2, "no cluster is found in the environment"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, 2, "no cluster is found in the environment"),
        (
            {
                "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_RANK": "0",
            },
            4,
            "process 0 was not met within 1 s",
        ),
    ],
    ids=["no cluster", "half of one", "a peer that never comes"],
)
def test_outside_a_cluster_nothing_aborts_in_jax(tmp_path, variables, code, words):
    command = [sys.executable, "-m", "moecc", "run", str(GOLDEN / "llama_gqa")]
    stated = {"MOECC_DISTRIBUTED": "cluster", "MOECC_JOIN_SECONDS": "1", **variables}
    done = subprocess.run(
        [*command, "--outputs", str(tmp_path / "o.npy")], capture_output=True, text=True,
        timeout=120, env={**os.environ, **stated},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert words in done.stderr


@pytest.mark.parametrize(("found", "fits"), [("0.0.42.1", True), ("0.0.52", False)])
def test_a_libtpu_that_does_not_fit_jax_is_named(monkeypatch, found, fits):
    versions = {"libtpu": found, "jax": "0.10.2"}
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

    from moecc.families import build
    from moecc.families.registry import parse_config
    from moecc.presets import preset_config
    from moecc.rewrite.pipeline import Pipeline, installed
    from moecc.rewrite.runner import run_pipeline

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
    graph = build(parse_config({**preset_config("smollm2-135m"), **small,
                                "num_attention_heads": 2, "num_key_value_heads": 2}))  # fmt: skip
    text = "annotate-sharding{mesh=model:2 rules=sequence-parallel},lower-collectives"
    run_pipeline(graph, Pipeline.parse(text, installed()))
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
