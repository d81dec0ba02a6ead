"""What a user can do wrong gets one clear message, an exit code, and leaves nothing behind."""

import os
import sys
import time
from functools import partial
from pathlib import Path
from threading import Lock
from types import ModuleType
from unittest.mock import Mock

import numpy as np
import pytest

from moecc.cli import entry
from moecc.support.process import Terminated

from .conftest import edited_tensors, read_json


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(cli, dense, tmp_path, out, value):
    name = "model.layers.1.mlp.down_proj.weight"
    with edited_tensors(dense) as tensors:
        tensors[name][1, 2] = value
    start = time.process_time()
    done = cli.convert(dense, out, code=1, says=(name, "1, 2", "--allow-nonfinite"))
    assert time.process_time() - start < 5
    assert done.out == ""
    assert os.listdir(tmp_path) == ["dense"]
    cli.convert(dense, out, "--allow-nonfinite")
    assert any(name in note for note in read_json(out / "moecc_manifest.json")["notes"])


def test_output_that_may_not_be_written(cli, dense, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").write_text("x")
    for out in (full, dense, dense / "inside", tmp_path / "no" / "such" / "parent"):
        cli.convert(dense, out, code=1)
    assert (full / "precious").read_text() == "x"
    assert not (dense / "inside").exists()
    cli.convert(dense, full, "--force")
    assert not (full / "precious").exists()


def test_token_files(cli, dense, tmp_path):
    path = tmp_path / "tokens.npy"
    command = ("run", dense, "--inputs", path, "--outputs", tmp_path / "l.npy")
    for bad in (np.zeros((2, 3)), np.array([[10**6]]), np.array([[-1]]), np.zeros((0, 4), int)):
        np.save(path, bad)
        cli(*command, code=1, says="tokens.npy")
    path.write_bytes(b"\x80\x04 pickle")
    cli(*command, code=1)


@pytest.fixture
def replace_opening(monkeypatch):
    """Let a function stand for the one that opens models."""
    return partial(monkeypatch.setattr, "moecc.model.open.open_model")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("can't start new thread"),
        ImportError("libjax_common.so: failed to map segment from shared object"),
    ],
)
def test_refused_memory_is_the_machine_s_fault(error, cli, dense, replace_opening):
    replace_opening(Mock(side_effect=error))
    done = cli("inspect", dense, code=4)
    assert done.err == "error: the machine has not enough memory for this\n"


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (Terminated(15), 143, "terminated by SIGTERM\n"),
    ],
)
def test_a_signal_amid_a_lock_ends_as_the_signal(raised, code, said, cli, dense, replace_opening):
    def broken(*args, **more):
        try:
            raise raised
        finally:
            Lock().release()  # as the standard library does on its way out

    replace_opening(broken)
    assert cli("inspect", dense, code=code).err == said


@pytest.mark.parametrize("kind", [RuntimeError, EOFError])  # which click takes for Ctrl-D
def test_a_bug_says_where_its_reproducer_is(kind, cli, dense, replace_opening):
    replace_opening(Mock(side_effect=kind("not meant to happen")))
    done = cli("inspect", dense, code=70)
    path = Path(done.err.rpartition(" ")[2].strip())
    assert "not meant to happen" in path.read_text()
    path.unlink()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\x00\xff\xfe random \x80 bytes",
        b"moecc 2\n",
        b"moecc 1\ngraph g {\n  input %a : f32[x=1]\n  %b = silu %a : f32[x=2]\n"
        b"  output y = %b\n}\n",
    ],
)
def test_graphs_that_are_none(cli, tmp_path, text):
    path = tmp_path / "bad.moe"
    path.write_bytes(text)
    done = cli("opt", path, "-p", "canonicalize", code=1)
    assert "bad.moe" in done.err or "no output" in done.err
    assert done.out == ""


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_an_interruption_while_modules_load_has_no_traceback(is_wrapped, monkeypatch):
    class HalfLoaded(ModuleType):
        @property
        def entry(self):
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt as error:
                if is_wrapped:  # as a class does that is being made
                    raise RuntimeError("error calling __set_name__") from error
                raise

    monkeypatch.setitem(sys.modules, "moecc.cli.main", HalfLoaded("main"))
    with pytest.raises(SystemExit) as stop:
        entry()
    assert stop.value.code == 130
