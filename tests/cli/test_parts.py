"""``convert --part`` and ``--join``: the bytes of one process, and every mixture of parts told."""

import errno
import os
import shutil
import signal

import numpy as np
import pytest

from moecc.cli.main import main
from moecc.formats.files import Disk, injected
from moecc.formats.output import claimed
from tests.support.commands import files_of

from ..kill.disks import CountingDisk, KillingDisk  # noqa: TID252
from ..kill.rig import in_child  # noqa: TID252
from .conftest import GOLDEN

PASSES = ("-p", "upcycle{experts=4 top-k=2}", "--to", "mixtral", "--no-check", "--allow-nonfinite",
          "--max-shard-bytes", "8000")  # fmt: skip
N = 5
PARTS = ".out.moecc-parts"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint with NaN and a matrix of zeros, in two files, and a licence."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path_factory.mktemp("parts") / "dense"
    shutil.copytree(GOLDEN / "llama_gqa", folder)
    (folder / "LICENSE").write_text("mine")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][1, 2] = np.nan
    tensors["model.layers.1.mlp.down_proj.weight"][:] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def written(source):
    """A folder with the output of one process, ``one``, and all parts of ``out``."""
    folder = source.parent
    assert main(["convert", str(source), str(folder / "one"), *PASSES]) == 0
    for number in (4, 2, 5, 1, 3):
        part = ("--part", f"{number}/{N}", "--threads", str(number))
        assert main(["convert", str(source), str(folder / "out"), *PASSES, *part]) == 0
    return folder


@pytest.fixture
def out(written, tmp_path):
    """An output of which all parts are complete."""
    shutil.copytree(written / PARTS, tmp_path / PARTS)
    return tmp_path / "out"


def part_of(out, number):
    return out.parent / PARTS / f"{number:05d}-of-{N:05d}"


def test_joined_parts_are_the_bytes_of_one_process(moecc, source, written, out):
    assert len(list((written / "one").glob("*.safetensors"))) > N + 2
    done = moecc("convert", source, out, *PASSES, "--join")
    assert done.code == 0, done.err
    assert files_of(out) == files_of(written / "one")
    assert os.listdir(out.parent) == ["out"]
    assert moecc("verify", out).code == 0


def test_a_part_that_was_killed_goes_on_and_one_that_is_complete_stays(moecc, source, written, out):
    part = part_of(out, 2)
    killed = part.with_name(f".{part.name}.moecc-partial")
    part.rename(killed)
    (killed / "moecc_part.json").unlink()
    journal = (killed / "moecc_journal.jsonl").read_bytes().splitlines(keepends=True)
    (killed / "moecc_journal.jsonl").write_bytes(b"".join(journal[:3]) + b'{"torn')
    command = ("convert", source, out, *PASSES)
    done = moecc(*command, "--join")
    assert done.code == 1
    assert f"part 2/{N} was killed" in done.err
    done = moecc(*command, "--part", f"2/{N}", "--resume")
    assert done.code == 0, done.err
    done = moecc(*command, "--part", f"3/{N}", "--resume")
    assert done.code == 0
    assert f"part 3/{N} was complete" in done.err
    assert moecc(*command, "--join").code == 0
    assert files_of(out) == files_of(written / "one")


def spoil_bytes(out):
    file = next(part_of(out, 1).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")


def exchange_parts(out):
    part_of(out, 1).rename(out.parent / "kept")
    part_of(out, 2).rename(part_of(out, 1))
    (out.parent / "kept").rename(part_of(out, 2))


def truncate_shard(out):
    os.truncate(next(part_of(out, 1).glob("*.safetensors")), 100)


def change_record(out):
    record = part_of(out, 1) / "moecc_part.json"
    record.write_bytes(record.read_bytes().replace(b"part/1", b"part/2"))


def change_version(out):
    for number in range(1, N + 1):
        journal = part_of(out, number) / "moecc_journal.jsonl"
        journal.write_bytes(journal.read_bytes().replace(b'"moecc": "', b'"moecc": "9', 1))


def add_division(out):
    shutil.copytree(part_of(out, 1), out.parent / PARTS / "00001-of-00002")


@pytest.mark.parametrize(
    ("spoil", "words", "problems"),
    [
        (lambda out: shutil.rmtree(out.parent / PARTS), "there are no parts to join", 1),
        (lambda out: shutil.rmtree(part_of(out, 3)), "part 3/5 is missing", 1),
        (spoil_bytes, "a tensor is not the one that its part wrote", 1),
        (exchange_parts, "was changed after it was written", 2),
        (truncate_shard, "part 1/5 was changed after it was written", 1),
        (change_record, "its seal does not match", 1),
        (change_version, "is of another conversion: versions moecc differs", N),
        (add_division, "the parts are of several divisions", 1),
    ],
)
def test_a_part_that_is_wrong_is_told_and_all_stay(
    moecc,
    source,
    out,
    spoil,
    words,
    problems,
):
    spoil(out)
    before = sorted(path.relative_to(out.parent) for path in out.parent.rglob("*"))
    done = moecc("convert", source, out, *PASSES, "--join")
    assert done.code == 1
    assert done.err.count(words) == problems == done.err.count("hint:"), done.err
    assert sorted(path.relative_to(out.parent) for path in out.parent.rglob("*")) == before


@pytest.mark.parametrize("option", [("--seed", "1"), ("--max-shard-bytes", "8001")])
def test_a_part_of_another_conversion_is_told(moecc, source, out, option):
    command = ("convert", source, out, *PASSES, *option)
    done = moecc(*command, "--part", f"2/{N}")
    assert done.code == 1
    assert f"part 2/{N} is of another conversion" in done.err
    assert moecc(*command, "--part", f"2/{N}", "--force").code == 0
    done = moecc("convert", source, out, *PASSES, "--join")
    assert done.code == 1
    assert f"part 2/{N} is of another conversion" in done.err


def test_parts_of_a_source_that_was_changed_are_told(moecc, source, out, tmp_path):
    shutil.copytree(source, tmp_path / "dense")
    done = moecc("convert", tmp_path / "dense", out, *PASSES, "--join")
    assert done.code == 1
    assert done.err.count("source model.safetensors differs") == N


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--part", "0/3"), "not a part of a conversion"),
        (("--part", "4/3"), "not a part of a conversion"),
        (("--part", "half"), "not a part of a conversion"),
        (("--part", "1/3", "--join"), "give one of them"),
        (("--part", "1/3", "--verify"), "--join"),
        (("--part", "1/300"), "there are more parts than shards"),
        (("--part", "1/300", "--dry-run"), "there are more parts than shards"),
        (("--part", "1/2", "--to", "gguf:llama"), "a GGUF file is written by one process"),
        (("--threads", "0"), "threads"),
    ],
)
def test_options_that_name_no_part(moecc, source, tmp_path, options, words):
    done = moecc("convert", source, tmp_path / "out", *PASSES, *options)
    assert done.code == 2, done.err
    assert words in done.err
    assert os.listdir(tmp_path) == []


def test_a_part_that_is_being_written_is_left_alone(moecc, source, out):
    part = part_of(out, 2)
    with claimed(part.with_name(f".{part.name}.moecc-partial"), take_over=False):
        done = moecc("convert", source, out, *PASSES, "--join")
        assert done.code == 1
        assert f"part 2/{N} is being written" in done.err
        done = moecc("clean", out)
        assert done.code == 1
        assert part.is_dir()
    done = moecc("clean", out)
    assert done.code == 0
    assert os.listdir(out.parent) == []


def test_shards_are_copied_where_a_file_has_one_name(moecc, source, written, out):
    class Linkless(Disk):
        def link(self, source, target):
            raise OSError(errno.EPERM, "Operation not permitted")

    with injected(Linkless()):
        done = moecc("convert", source, out, *PASSES, "--join")
    assert done.code == 0, done.err
    assert files_of(out) == files_of(written / "one")


def test_a_join_that_was_killed_begins_again(moecc, source, written, out):
    partial = out.parent / ".out.moecc-partial"
    partial.mkdir()
    os.link(next(part_of(out, 1).glob("*.safetensors")), partial / "model.safetensors")
    command = ("convert", source, out, *PASSES, "--join")
    done = moecc(*command)
    assert done.code == 1
    assert "an earlier conversion was killed" in done.err
    assert moecc(*command, "--resume").code == 0
    assert files_of(out) == files_of(written / "one")


def test_the_plan_of_a_part_counts_its_bytes(moecc, source, tmp_path):
    command = ("convert", source, tmp_path / "out", *PASSES, "--dry-run", "--format", "json")
    shares = [moecc(*command, "--part", f"{n}/{N}").json()["work"] for n in range(1, N + 1)]
    total = moecc(*command).json()["work"]
    for key in ("shards", "written_bytes"):
        assert sum(share[key] for share in shares) == total[key]
    assert max(share["read_bytes"] for share in shares) < total["read_bytes"]
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # where another test imported jax
def test_a_join_that_is_killed_at_any_call_loses_nothing(moecc, source, written, tmp_path):
    expected = files_of(written / "one")
    command = ["convert", str(source), str(tmp_path / "out"), *PASSES, "--join"]

    def renew():
        for folder in tmp_path.iterdir():
            shutil.rmtree(folder)
        shutil.copytree(written / PARTS, tmp_path / PARTS)

    def join_on(disk):
        with injected(disk):
            return main(command)

    renew()
    counting = CountingDisk()
    assert join_on(counting) == 0
    for at in range(counting.calls):
        renew()
        assert in_child(lambda at=at: join_on(KillingDisk(at))) == -signal.SIGKILL, at
        if (tmp_path / "out").exists():
            assert moecc("clean", tmp_path / "out").code == 0
        else:
            assert moecc(*command, "--resume").code == 0, at
        assert files_of(tmp_path / "out") == expected, at
        assert os.listdir(tmp_path) == ["out"], at
