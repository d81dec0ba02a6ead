"""``convert --part`` and ``--join``: the bytes of one process, and every mixture of parts told."""

import errno
import os
import shutil
import signal
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest

from moecc.cli.main import main
from moecc.formats.files import Disk, injected
from moecc.formats.output import claimed
from tests.support.commands import files_of

from ..kill.disks import CountingDisk, KillingDisk  # noqa: TID252
from ..kill.rig import in_child  # noqa: TID252
from .conftest import LLAMA, UPCYCLE, edited_tensors

PASSES = ("-p", UPCYCLE, "--to", "mixtral", "--no-check", "--allow-nonfinite",
          "--max-shard-bytes", "8000")  # fmt: skip
N = 5
PARTS = ".out.moecc-parts"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint with NaN and a matrix of zeros, in two files, and a licence."""
    folder = shutil.copytree(LLAMA, tmp_path_factory.mktemp("parts") / "dense")
    (folder / "LICENSE").write_text("mine")
    with edited_tensors(folder) as tensors:
        tensors["model.layers.2.mlp.up_proj.weight"][1, 2] = np.nan
        tensors["model.layers.1.mlp.down_proj.weight"][:] = 0
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


@pytest.fixture
def expected(written):
    return files_of(written / "one")


@pytest.fixture
def convert(cli, source, out):
    """Convert the source into the output."""
    return partial(cli, "convert", source, out, *PASSES)


def part_of(out, number):
    return out.parent / PARTS / f"{number:05d}-of-{N:05d}"


def partial_of(part):
    return part.with_name(f".{part.name}.moecc-partial")


def shard_of(part):
    return next(part.glob("*.safetensors"))


def test_joined_parts_are_the_bytes_of_one_process(cli, convert, expected, out):
    assert sum(name.endswith(".safetensors") for name in expected) > N + 2
    convert("--join")
    assert files_of(out) == expected
    assert os.listdir(out.parent) == ["out"]
    cli("verify", out)


def test_a_part_that_was_killed_goes_on_and_one_that_is_complete_stays(convert, expected, out):
    part = part_of(out, 2)
    killed = part.rename(partial_of(part))
    (killed / "moecc_part.json").unlink()
    journal = (killed / "moecc_journal.jsonl").read_bytes().splitlines(keepends=True)
    (killed / "moecc_journal.jsonl").write_bytes(b"".join(journal[:3]) + b'{"torn')
    convert("--join", code=1, says=f"part 2/{N} was killed")
    convert("--part", f"2/{N}", "--resume")
    done = convert("--part", f"3/{N}", "--resume", says=f"part 3/{N} was complete")
    assert f"part 3/{N} is in {part_of(out, 3)}; after all parts, --join writes {out}" in done.out
    convert("--join")
    assert files_of(out) == expected


def spoil_bytes(out):
    file = shard_of(part_of(out, 1))
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")


def exchange_parts(out):
    part_of(out, 1).rename(out.parent / "kept")
    part_of(out, 2).rename(part_of(out, 1))
    (out.parent / "kept").rename(part_of(out, 2))


def truncate_shard(out):
    os.truncate(shard_of(part_of(out, 1)), 100)


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
def test_a_part_that_is_wrong_is_told_and_all_stay(convert, out, spoil, words, problems):
    spoil(out)
    before = set(out.parent.rglob("*"))
    done = convert("--join", code=1)
    assert done.err.count(words) == problems == done.err.count("hint:"), done.err
    assert set(out.parent.rglob("*")) == before


@pytest.mark.parametrize("option", [("--seed", "1"), ("--max-shard-bytes", "8001")])
def test_a_part_of_another_conversion_is_told(convert, option):
    part, says = ("--part", f"2/{N}"), f"part 2/{N} is of another conversion"
    convert(*option, *part, code=1, says=says)
    convert(*option, *part, "--force")
    convert("--join", code=1, says=says)


def test_parts_of_a_source_that_was_changed_are_told(cli, source, out, tmp_path):
    copy = shutil.copytree(source, tmp_path / "dense")
    done = cli("convert", copy, out, *PASSES, "--join", code=1)
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
def test_options_that_name_no_part(cli, source, tmp_path, options, words):
    cli("convert", source, tmp_path / "out", *PASSES, *options, code=2, says=words)
    assert os.listdir(tmp_path) == []


def test_a_part_that_is_being_written_is_left_alone(cli, convert, out):
    part = part_of(out, 2)
    with claimed(partial_of(part), take_over=False):
        convert("--join", code=1, says=f"part 2/{N} is being written")
        cli("clean", out, code=1)
        assert part.is_dir()
    cli("clean", out)
    assert os.listdir(out.parent) == []


def test_shards_are_copied_where_a_file_has_one_name(convert, expected, out):
    linkless = Disk()
    linkless.link = Mock(side_effect=OSError(errno.EPERM, "Operation not permitted"))
    with injected(linkless):
        convert("--join")
    assert linkless.link.called
    assert files_of(out) == expected


def test_a_join_that_was_killed_begins_again(convert, expected, out):
    killed = partial_of(out)
    killed.mkdir()
    os.link(shard_of(part_of(out, 1)), killed / "model.safetensors")
    convert("--join", code=1, says="an earlier conversion was killed")
    convert("--join", "--resume")
    assert files_of(out) == expected


def test_the_plan_of_a_part_counts_its_bytes(cli, source, tmp_path):
    command = ("convert", source, tmp_path / "out", *PASSES, "--dry-run")
    shares = [cli.json(*command, "--part", f"{n}/{N}")["work"] for n in range(1, N + 1)]
    total = cli.json(*command)["work"]
    for key in ("shards", "written_bytes"):
        assert sum(share[key] for share in shares) == total[key]
    assert max(share["read_bytes"] for share in shares) < total["read_bytes"]
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # where another test imported jax
def test_a_join_that_is_killed_at_any_call_loses_nothing(
    moecc, source, written, expected, tmp_path
):
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
            assert moecc("clean", tmp_path / "out").code == 0, at
        else:
            assert moecc(*command, "--resume").code == 0, at
        assert files_of(tmp_path / "out") == expected, at
        assert os.listdir(tmp_path) == ["out"], at
