"""Streams that are closed, outputs that are no place for one, devices that are not there."""

import os
import subprocess
import sys
from threading import Thread

import pytest

UPCYCLE = ("-p", "upcycle", "--to", "mixtral")


def in_shell(text, **env):
    command = text.replace("moecc ", f"{sys.executable} -m moecc ", 1)
    return subprocess.run(
        ["sh", "-c", command],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=300,
    )


def test_streams_may_be_closed(dense, tmp_path):
    """What is printed then is lost, and gets into no file."""
    out = tmp_path / "out"
    done = in_shell(f"moecc convert {dense} {out} {' '.join(UPCYCLE)} <&- >&- 2>&-")
    assert done.returncode == 0
    assert in_shell(f"moecc verify {out} 2>&-").returncode == 0


def test_a_file_that_cannot_be_written_whole_is_named(dense, tmp_path):
    done = in_shell(f"ulimit -f 4; moecc import {dense} -o {tmp_path}/model.moe")
    assert done.returncode == 4
    assert f"{tmp_path}/model.moe: cannot write the file: File too large" in done.stderr
    assert list(tmp_path.iterdir()) == [dense]


@pytest.mark.parametrize("words", [("clean",), ("convert", "dense")], ids=lambda w: w[0])
def test_the_root_is_no_output(moecc, dense, words):
    command, *source = words
    more = UPCYCLE if source else ()
    done = moecc(command, *(dense for _ in source), "/", *more)
    assert done.code == (1 if source else 0), done.err


def test_a_journal_that_is_a_pipe_is_not_waited_for(moecc, dense, tmp_path):
    partial = tmp_path / ".out.moecc-partial"
    partial.mkdir()
    os.mkfifo(partial / "moecc_journal.jsonl")
    assert moecc("convert", dense, tmp_path / "out", *UPCYCLE, "--resume").code == 0


def test_a_pipe_or_device_is_written_to_and_never_replaced(moecc, dense, tmp_path):
    pipe, texts = tmp_path / "pipe", list[str]()
    os.mkfifo(pipe)
    for more in ((), ("--force",)):
        reader = Thread(target=lambda: texts.append(pipe.read_text()), daemon=True)
        reader.start()
        done = moecc("import", dense, "-o", pipe, *more)
        assert done.code == 0, done.err
        reader.join(60)
        assert pipe.is_fifo()
    piped = in_shell(f"moecc import {dense} -o /dev/stdout")
    assert texts == [piped.stdout] * 2
    assert texts[0].startswith("moecc 1")


def test_platforms_that_jax_does_not_have_are_named(dense, tmp_path):
    done = in_shell(f"moecc run {dense} --outputs {tmp_path / 'y.npy'}", JAX_PLATFORMS="nope")
    assert done.returncode == 4, done.stderr
    assert "JAX_PLATFORMS: jax finds no device" in done.stderr
