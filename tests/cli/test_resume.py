"""``convert --resume``, the journal, ``clean``, and locks between writers."""

import json
import os
import shutil

import pytest

from moecc.formats.files import Disk, injected
from moecc.formats.output import output_folder
from tests.support.commands import files_of

PASSES = ("-p", "upcycle{experts=4 top-k=2}", "--to", "mixtral", "--no-check",
          "--max-shard-bytes", "30000")  # fmt: skip
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
            shutil.copytree(self.folder / PARTIAL, self.folder / "kept")


@pytest.fixture
def killed(moecc, dense, tmp_path):
    """The expected output, and beside ``out`` what a killed conversion left."""
    (dense / "LICENSE").write_text("mine")
    with injected(Stopping(tmp_path, 12)):
        assert moecc("convert", dense, tmp_path / "out", *PASSES).code == 0
    (tmp_path / "out").rename(tmp_path / "expected")
    (tmp_path / "kept").rename(tmp_path / PARTIAL)
    return tmp_path


def test_a_killed_conversion_is_continued_to_the_same_bytes(moecc, dense, killed, monkeypatch):
    from moecc.formats import writer

    made = []
    real = writer._Work._write_job

    def counted(self, job):
        made.append(job.names[0])
        real(self, job)

    monkeypatch.setattr(writer._Work, "_write_job", counted)
    done = moecc("convert", dense, killed / "out", *PASSES, "--resume")
    assert done.code == 0, done.err
    assert files_of(killed / "out") == files_of(killed / "expected")
    assert not (killed / PARTIAL).exists()
    # Eleven of them were complete.
    assert len(made) == len(set(made)) == 33 - 11


def test_what_was_tampered_with_is_written_again(moecc, dense, killed):
    for file in (killed / PARTIAL).glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-100:] = bytes(100)
        data[3000] ^= 1
        file.write_bytes(data)
    (killed / PARTIAL / "evil.py").write_text("evil")
    (killed / PARTIAL / "config.json").write_text("{}")
    with (killed / PARTIAL / JOURNAL).open("a") as journal:
        journal.write('{"name": "model.norm.weight", "sha256": "00"}\n{"torn')
    done = moecc("convert", dense, killed / "out", *PASSES, "--resume")
    assert done.code == 0, done.err
    assert files_of(killed / "out") == files_of(killed / "expected")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--seed", "1"), "seed differs"),
        (("-p", "upcycle{experts=8 top-k=2}"), "pipeline differs"),
        (("--allow-nonfinite",), "options differs"),
    ],
)
def test_another_conversion_is_not_continued(moecc, dense, killed, change, words):
    done = moecc("convert", dense, killed / "out", *PASSES, "--resume", *change)
    assert done.code == 1, done.err
    assert words in done.err
    assert (killed / PARTIAL / JOURNAL).exists()
    assert moecc("convert", dense, killed / "out", *PASSES, "--resume").code == 0


def test_nonfinite_values_of_the_first_run_are_not_forgotten(moecc, dense, tmp_path, edit_tensors):
    def spoil(tensors):
        for name in ("model.embed_tokens.weight", "model.layers.2.mlp.up_proj.weight"):
            tensors[name] = tensors[name].copy()
            tensors[name][1, 2] = float("nan")

    edit_tensors(spoil)
    command = ("convert", dense, tmp_path / "out", *PASSES, "--allow-nonfinite")
    with injected(Stopping(tmp_path, 12)):
        assert moecc(*command).code == 0
    (tmp_path / "out").rename(tmp_path / "expected")
    (tmp_path / "kept").rename(tmp_path / PARTIAL)
    assert "nonfinite" in (tmp_path / PARTIAL / JOURNAL).read_text()
    assert moecc(*command, "--resume").code == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")


def test_two_writers_do_not_continue_one_output(moecc, dense, killed):
    with output_folder(killed / "out", can_resume=lambda _: True):
        done = moecc("convert", dense, killed / "out", *PASSES, "--resume")
        assert done.code == 1
        assert "another conversion is writing this output" in done.err
        done = moecc("clean", killed / "out")
        assert done.code == 1
        assert (killed / PARTIAL).is_dir()
        shutil.copytree(killed / "expected", killed / PARTIAL, dirs_exist_ok=True)


@pytest.fixture
def old(tmp_path):
    """What is left between the two renames of ``--force``."""
    (tmp_path / ".out.moecc-old").mkdir()
    (tmp_path / ".out.moecc-old" / "config.json").write_text("precious")
    return tmp_path


def test_clean_removes_what_was_left(moecc, killed):
    done = moecc("clean", killed / "out")
    assert done.code == 0
    assert f"removed {killed / PARTIAL}" in done.err
    assert sorted(os.listdir(killed)) == ["dense", "expected"]
    assert "nothing was left" in moecc("clean", killed / "out").err


def test_clean_puts_an_old_output_back(moecc, old):
    done = moecc("clean", old / "out")
    assert done.code == 0
    assert "back as" in done.err
    assert (old / "out" / "config.json").read_text() == "precious"
    assert os.listdir(old) == ["out"]


def test_a_gguf_file_is_continued_too(moecc, dense, tmp_path):
    command = ("convert", dense, tmp_path / "m.gguf", "-p", "upcycle{experts=4}", "--to",
               "gguf:llama", "--no-check")  # fmt: skip

    class Keeping(Stopping):
        def append(self, descriptor, data):
            Disk.append(self, descriptor, data)
            self.lines -= 1
            if self.lines == 0:
                shutil.copytree(self.folder / ".m.gguf.moecc-partial", self.folder / "kept")

    with injected(Keeping(tmp_path, 9)):
        assert moecc(*command).code == 0
    for name in ("m.gguf", "m.gguf.moecc.json"):
        (tmp_path / name).rename(tmp_path / f"expected-{name}")
    (tmp_path / "kept").rename(tmp_path / ".m.gguf.moecc-partial")
    assert moecc(*command).code == 1
    done = moecc(*command, "--resume")
    assert done.code == 0, done.err
    for name in ("m.gguf", "m.gguf.moecc.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / f"expected-{name}").read_bytes()
    assert json.loads((tmp_path / "m.gguf.moecc.json").read_text())["schema"] == 2
    assert not (tmp_path / ".m.gguf.moecc-partial").exists()
