"""``convert --resume``, the journal, ``clean``, and locks between writers."""

import os
import shutil
from contextlib import contextmanager
from functools import partial

import pytest

from moecc.formats import writer
from moecc.formats.files import Disk, injected
from moecc.formats.output import output_folder
from tests.support.commands import files_of

from .conftest import edited_tensors, read_json

PARTIAL = ".out.moecc-partial"
JOURNAL = "moecc_journal.jsonl"


class Stopping(Disk):
    """Keeps a copy of the partial output as it is once some tensors are complete."""

    def __init__(self, folder, lines):
        self.folder, self.lines = folder, lines

    def append(self, descriptor, data):
        super().append(descriptor, data)
        self.lines -= 1
        if self.lines == 0:
            shutil.copytree(self.folder, self.folder.with_name("kept"))


@contextmanager
def killed_after(lines, folder):
    """Leave a partial output as if what is done had been killed once some tensors are complete."""
    with injected(Stopping(folder, lines)):
        yield
    folder.with_name("kept").rename(folder)


@pytest.fixture
def convert(cli, dense, out):
    return partial(cli.convert, dense, out, "--no-check", "--max-shard-bytes", "30000")


@pytest.fixture
def killed(convert, dense, tmp_path):
    """The expected output, and beside ``out`` what a killed conversion left."""
    (dense / "LICENSE").write_text("mine")
    with killed_after(12, tmp_path / PARTIAL):
        convert()
    (tmp_path / "out").rename(tmp_path / "expected")
    return tmp_path


def test_a_killed_conversion_is_continued_to_the_same_bytes(convert, killed, monkeypatch):
    written, write_job = [], writer._Work._write_job

    def count_and_write(self, job):
        written.append(job.names[0])
        write_job(self, job)

    monkeypatch.setattr(writer._Work, "_write_job", count_and_write)
    convert("--resume")
    assert files_of(killed / "out") == files_of(killed / "expected")
    assert not (killed / PARTIAL).exists()
    # Eleven of them were complete.
    assert len(written) == len(set(written)) == 33 - 11


def test_what_was_tampered_with_is_written_again(convert, killed):
    for file in (killed / PARTIAL).glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-100:] = bytes(100)
        data[3000] ^= 1
        file.write_bytes(data)
    (killed / PARTIAL / "evil.py").write_text("evil")
    (killed / PARTIAL / "config.json").write_text("{}")
    with (killed / PARTIAL / JOURNAL).open("a") as journal:
        journal.write('{"name": "model.norm.weight", "sha256": "00"}\n{"torn')
    convert("--resume")
    assert files_of(killed / "out") == files_of(killed / "expected")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--seed", "1"), "seed differs"),
        (("-p", "upcycle{experts=8 top-k=2}"), "pipeline differs"),
        (("--allow-nonfinite",), "options differs"),
    ],
)
def test_another_conversion_is_not_continued(convert, killed, change, words):
    convert("--resume", *change, code=1, says=words)
    assert (killed / PARTIAL / JOURNAL).exists()
    convert("--resume")


def test_nonfinite_values_of_the_first_run_are_not_forgotten(convert, dense, tmp_path):
    with edited_tensors(dense) as tensors:
        for name in ("model.embed_tokens.weight", "model.layers.2.mlp.up_proj.weight"):
            tensors[name][1, 2] = float("nan")
    with killed_after(12, tmp_path / PARTIAL):
        convert("--allow-nonfinite")
    expected = files_of((tmp_path / "out").rename(tmp_path / "expected"))
    assert "nonfinite" in (tmp_path / PARTIAL / JOURNAL).read_text()
    convert("--allow-nonfinite", "--resume")
    assert files_of(tmp_path / "out") == expected


def test_two_writers_do_not_continue_one_output(cli, convert, killed):
    with output_folder(killed / "out", can_resume=lambda _: True):
        convert("--resume", code=1, says="another conversion is writing this output")
        cli("clean", killed / "out", code=1)
        assert (killed / PARTIAL).is_dir()
        shutil.copytree(killed / "expected", killed / PARTIAL, dirs_exist_ok=True)


def test_clean_removes_what_was_left(cli, killed):
    cli("clean", killed / "out", says=f"removed {killed / PARTIAL}")
    assert sorted(os.listdir(killed)) == ["dense", "expected"]
    assert "there is no such output, and nothing was left" in cli("clean", killed / "out").err


def test_clean_puts_an_old_output_back(cli, tmp_path):
    """It is what is left between the two renames of ``--force``."""
    old, out = tmp_path / ".out.moecc-old", tmp_path / "out"
    old.mkdir()
    (old / "config.json").write_text("precious")
    cli("clean", out, says="back as")
    assert (out / "config.json").read_text() == "precious"
    assert list(tmp_path.iterdir()) == [out]


def test_a_gguf_file_is_continued_too(cli, dense, tmp_path):
    files = [tmp_path / "m.gguf", tmp_path / "m.gguf.moecc.json"]
    killed = tmp_path / ".m.gguf.moecc-partial"
    convert = partial(cli.convert, dense, files[0], "--no-check", to="gguf:llama")
    with killed_after(9, killed):
        convert()
    expected = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    convert(code=1)
    convert("--resume")
    assert [file.read_bytes() for file in files] == expected
    assert read_json(files[1])["schema"] == 2
    assert not killed.exists()
