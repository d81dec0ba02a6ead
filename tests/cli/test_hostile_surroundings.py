"""Streams that are closed, outputs that are no place for one, devices that are not there."""

import os
from threading import Thread

import pytest

from .conftest import LLAMA, run_shell


def test_streams_may_be_closed(dense, out):
    """What is printed then is lost, and gets into no file."""
    run_shell(f"moecc convert {dense} {out} -p upcycle --to mixtral <&- >&- 2>&-")
    run_shell(f"moecc verify {out} 2>&-")


def test_a_file_that_cannot_be_written_whole_is_named(dense, tmp_path):
    done = run_shell(f"ulimit -f 2; moecc import {dense} -o {tmp_path}/model.moe", code=4)
    assert f"{tmp_path}/model.moe: cannot write the file: File too large" in done.stderr
    assert list(tmp_path.iterdir()) == [dense]


@pytest.mark.parametrize(
    ("words", "code"),
    [(("clean", "/"), 0), (("convert", LLAMA, "/", "-p", "upcycle", "--to", "mixtral"), 1)],
    ids=["clean", "convert"],
)
def test_the_root_is_no_output(cli, words, code):
    cli(*words, code=code)


def test_a_journal_that_is_a_pipe_is_not_waited_for(cli, dense, tmp_path, out):
    partial = tmp_path / ".out.moecc-partial"
    partial.mkdir()
    os.mkfifo(partial / "moecc_journal.jsonl")
    cli.convert(dense, out, "--resume")


def test_a_pipe_or_device_is_written_to_and_never_replaced(cli, dense, tmp_path):
    pipe, texts = tmp_path / "pipe", []
    os.mkfifo(pipe)
    for more in ((), ("--force",)):
        reader = Thread(target=lambda: texts.append(pipe.read_text()), daemon=True)
        reader.start()
        cli("import", dense, "-o", pipe, *more)
        reader.join(60)
        assert pipe.is_fifo()
    piped = run_shell(f"moecc import {dense} -o /dev/stdout")
    assert texts == [piped.stdout] * 2
    assert texts[0].startswith("moecc 1")


def test_platforms_that_jax_does_not_have_are_named(dense, tmp_path):
    line = f"moecc run {dense} --outputs {tmp_path / 'y.npy'}"
    done = run_shell(line, code=4, JAX_PLATFORMS="nope")
    assert "JAX_PLATFORMS: jax finds no device" in done.stderr
