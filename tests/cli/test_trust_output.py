"""Outputs survive a loss of power, few descriptors, signals and kills."""

import os
import signal
import sys
from pathlib import Path
from subprocess import PIPE, Popen

import pytest

PIPELINE = "upcycle{experts=16 top-k=2}"


def events_of(monkeypatch):
    """Record what is synchronised and renamed, in order."""
    events = []
    fsync, rename = os.fsync, os.rename

    def recording_fsync(descriptor):
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def recording_rename(source, target):
        events.append(("rename", str(source)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "rename", recording_rename)
    return events


def test_every_file_is_synchronised_before_the_rename_and_the_folder_after(
    cli, dense, tmp_path, out, monkeypatch
):
    (dense / "tokenizer.json").write_text("{}")
    events = events_of(monkeypatch)
    cli.convert(dense, out, "--max-shard-bytes", "100000", pipeline=PIPELINE)
    renamed = next(i for i, (what, _) in enumerate(events) if what == "rename")
    temporary = Path(events[renamed][1])
    before = {path for what, path in events[:renamed] if what == "fsync"}
    files = [p.relative_to(out) for p in out.rglob("*")]
    assert {str(temporary / name) for name in files} | {str(temporary)} <= before
    assert ("fsync", str(tmp_path)) in events[renamed:]


SLOW = r"""
import os, sys, time
from moecc.formats import writer
from moecc.cli.main import main
blocks = writer.row_blocks
def slow(*args):
    os.write(1, b'writing\n')  # one call: several threads write
    time.sleep(0.2)
    return blocks(*args)
writer.row_blocks = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130)],
    ids=["SIGTERM", "SIGINT"],
)
def test_a_signal_leaves_nothing(dense, tmp_path, out, number, code):
    """The signal comes while the temporary folder of the conversion has weights."""
    words = ("convert", dense, out, "-p", PIPELINE, "--to", "mixtral")
    process = Popen([sys.executable, "-c", SLOW, *words], stdout=PIPE, stderr=PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == ["dense"]
