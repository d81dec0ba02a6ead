"""What a user can do wrong gets one clear message, an exit code, and leaves nothing behind."""

import json
import os
import sys
import time
from pathlib import Path
from threading import Lock
from types import ModuleType

import numpy as np
import pytest

from moecc.cli import entry
from moecc.support.process import Terminated

UPCYCLE = "upcycle{experts=4 top-k=2}"


def convert(moecc, source, out, *more):
    return moecc("convert", source, out, "-p", UPCYCLE, "--to", "mixtral", *more)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(moecc, dense, tmp_path, edit_tensors, value):
    name = "model.layers.1.mlp.down_proj.weight"

    def change(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name][1, 2] = value

    edit_tensors(change)
    start = time.process_time()
    done = convert(moecc, dense, tmp_path / "out")
    assert time.process_time() - start < 5
    assert (done.code, done.out) == (1, "")
    assert os.listdir(tmp_path) == ["dense"]
    for words in (name, "1, 2", "--allow-nonfinite"):
        assert words in done.err
    assert convert(moecc, dense, tmp_path / "out", "--allow-nonfinite").code == 0
    manifest = json.loads((tmp_path / "out" / "moecc_manifest.json").read_text())
    assert any(name in note for note in manifest["notes"])


def test_output_that_may_not_be_written(moecc, dense, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").write_text("x")
    for out in (full, dense, dense / "inside", tmp_path / "no" / "such" / "parent"):
        done = convert(moecc, dense, out)
        assert done.code == 1, out
    assert (full / "precious").read_text() == "x"
    assert not (dense / "inside").exists()
    assert convert(moecc, dense, full, "--force").code == 0
    assert not (full / "precious").exists()


def test_token_files(moecc, dense, tmp_path):
    path = tmp_path / "tokens.npy"
    for bad in (np.zeros((2, 3)), np.array([[10**6]]), np.array([[-1]]), np.zeros((0, 4), int)):
        np.save(path, bad)
        done = moecc("run", dense, "--inputs", path, "--outputs", tmp_path / "l.npy")
        assert done.code == 1, bad
        assert "tokens.npy" in done.err
    path.write_bytes(b"\x80\x04 pickle")
    assert moecc("run", dense, "--inputs", path, "--outputs", tmp_path / "l.npy").code == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("can't start new thread"),
        ImportError("libjax_common.so: failed to map segment from shared object"),
    ],
)
def test_refused_memory_is_the_machine_s_fault(error, moecc, dense, monkeypatch):
    def failing(*args, **more):
        raise error

    monkeypatch.setattr("moecc.model.open.open_model", failing)
    done = moecc("inspect", dense)
    assert (done.code, done.err) == (4, "error: the machine has not enough memory for this\n")


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (Terminated(15), 143, "terminated by SIGTERM\n"),
    ],
)
def test_a_signal_amid_a_lock_ends_as_the_signal(
    raised, code, said,
    moecc, dense, monkeypatch,
):  # fmt: skip
    def broken(*args, **more):
        try:
            raise raised
        finally:
            Lock().release()  # as the standard library does on its way out

    monkeypatch.setattr("moecc.model.open.open_model", broken)
    done = moecc("inspect", dense)
    assert (done.code, done.err) == (code, said)


@pytest.mark.parametrize("kind", [RuntimeError, EOFError])  # which click takes for Ctrl-D
def test_a_bug_says_where_its_reproducer_is(kind, moecc, dense, monkeypatch):
    def broken(*args, **more):
        raise kind("not meant to happen")

    monkeypatch.setattr("moecc.model.open.open_model", broken)
    done = moecc("inspect", dense)
    assert done.code == 70
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
def test_graphs_that_are_none(moecc, tmp_path, text):
    path = tmp_path / "bad.moe"
    path.write_bytes(text)
    done = moecc("opt", path, "-p", "canonicalize")
    assert done.code == 1
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
