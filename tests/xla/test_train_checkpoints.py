"""Checkpoints by Orbax: saved by one program, restored by another on another mesh."""

import errno
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiers import few

from moecc.errors import MachineError
from moecc.formats.run import LINEAGE_SCHEMA, check_step, saved_steps
from moecc.ir import clone
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.train.recipe import OptimizerSection
from moecc.train.run import Position, create_run
from moecc.train.state import canonical

from .models import apply_passes, open_golden

pytest.importorskip("optax")
pytest.importorskip("orbax.checkpoint")

from moecc_backends.xla.train.checkpoints import RunCheckpoints, Saver, _failed, load

from .train.small import make_step

SIZES = {"B": 8, "S": 8}

FLAT = "cse"
ROLLED = "cse,roll-layers"
MESH = "cse,annotate-sharding{{mesh={} rules={}}},roll-layers"
PROGRAMS = [
    ROLLED,
    MESH.format("data:2,expert:4", "data-parallel,expert-parallel"),
    FLAT,
    MESH.format("fsdp:4,expert:2", "fsdp,expert-parallel"),
]


@pytest.fixture(scope="module")
def model():
    with open_golden("llama_gqa") as opened:
        apply_passes(opened.graph, "upcycle{experts=4 top-k=2}")
        yield opened


@pytest.fixture(scope="module")
def canonical_model(model):
    return canonical(model.graph)


@pytest.fixture
def run(tmp_path):
    lineage = {"schema": LINEAGE_SCHEMA}
    create_run(
        tmp_path / "run", recipe="", graph="", lineage=lineage, source={"config.json": b"{}"}
    )
    return tmp_path / "run"


@pytest.fixture
def open_store(run, canonical_model, model):
    """Return a function to the checkpoints of the run, for a program made by some passes."""

    def open_store(passes=FLAT, update="adamw", beside=True):
        graph = clone(canonical_model.graph)
        run_pipeline(graph, Pipeline.parse(passes), context=Context(allow_unmatched=True))
        step = make_step(
            graph, SIZES, OptimizerSection(update), devices=8 if "mesh=" in passes else 1
        )

        def start():
            params = step.abstract_state["params"]
            state = step.init(load(graph, canonical_model.weights, model.checkpoint.read, params))
            return jax.tree.map(lambda x: x + np.asarray(0.5, x.dtype), state), Position()

        saver = Saver(run, 2, beside)
        return RunCheckpoints(run, graph, lambda _: step.abstract_state, start, saver, "sha256:0")

    return open_store


@pytest.mark.parametrize(("update", "beside"), few([("adamw", True), ("adafactor", False)]))
def test_any_program_restores_what_any_other_saved(
    canonical_model, run, open_store, update, beside, monkeypatch
):
    if beside:
        # As of an accelerator: tensors are made in the memory of its host.
        pinned = "moecc_backends.xla.train.checkpoints._on_host"
        monkeypatch.setattr(pinned, lambda where: where.with_memory_kind("pinned_host"))
    restored = []
    for number, passes in enumerate(PROGRAMS):
        store = open_store(passes, update, beside)
        state, at, best, _ = store.begin()
        assert at == (Position() if number == 0 else Position(number, 10 * number, (1,)))
        assert best == (None if number == 0 else 3.0)
        restored.append({key: np.asarray(a) for key, a in store._tensors(state, 0).items()})
        done = store.save(state, Position(number + 1, 10 * number + 10, (1,)), 3.0 + number, False)
        assert [saved.step for saved in done] == [number + 1] * (not beside)
        assert [saved.step for saved in store.wait()] == [number + 1] * beside
        store.saver.close()
    first, *rest = restored
    assert {f"params.{name}" for name in canonical_model.graph.params} < first.keys()
    for other in rest:
        assert other.keys() == first.keys()
        for key, array in other.items():
            np.testing.assert_array_equal(array, first[key], err_msg=key)
    assert [s.number for s in saved_steps(run)] == [1, 3, 4]


def test_an_evaluation_is_added_to_the_checkpoint_that_lacks_it(run, open_store):
    store = open_store()
    state, *_ = store.begin()
    store.save(state, Position(1, 10), None, True)
    store.wait()
    assert store.begin()[1:] == (Position(1, 10), None, True)
    store.record_loss(1, 2.5)
    assert store.begin()[1:] == (Position(1, 10), 2.5, False)
    (step,) = saved_steps(run)
    check_step(run, step)


def test_a_save_that_fails_is_an_error_of_the_machine_and_loses_nothing(
    run, open_store, monkeypatch
):
    store = open_store()
    state, *_ = store.begin()
    store.save(state, Position(1), None, False)
    store.wait()

    def replace(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    # The disk is filled while the arrays are written, and is found full when the step is finished.
    monkeypatch.setattr("os.replace", replace)
    store.save(state, Position(2), None, False)
    with pytest.raises(MachineError, match="No space left"):
        store.wait()
    monkeypatch.undo()
    assert [s.number for s in saved_steps(run)] == [1]
    store.save(state, Position(3), None, False)
    assert [saved.step for saved in store.wait()] == [3]
    store.saver.close()


@pytest.mark.parametrize(
    "said",
    [
        "Failed to write 313089 bytes to file 6: File too large [os_error_code='27']",
        "file 4: File too large [spec='{transform: {min: [0,0]}}'] [os_error_code='27']",
    ],
)
def test_what_the_system_says_is_found_in_what_tensorstore_says(said, tmp_path):
    assert _failed(ValueError(said), tmp_path).problems[0].found == "File too large"


def test_arrays_that_cannot_be_written_are_one_error_without_tracebacks(tmp_path):
    (tmp_path / "steps").mkdir()
    program = """if True:
        import resource, sys, jax
        from pathlib import Path
        from moecc_backends.xla.train.checkpoints import Saver
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        keys = jax.random.split(jax.random.key(0), 24)
        tensors = {f"params.{n}": jax.random.normal(k, (300, 300)) for n, k in enumerate(keys)}
        saver = Saver(Path(sys.argv[1]), keep=1)
        try:
            saver.save(1, tensors, {})
        finally:
            saver.close()
    """
    # Without -B Python would write bytecode of what it imports, cut off at the limit.
    words = [sys.executable, "-B", "-c", program, tmp_path]
    done = subprocess.run(words, capture_output=True, text=True)
    assert "found: File too large" in done.stderr
    assert "Event loop is closed" not in done.stderr
