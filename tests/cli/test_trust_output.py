"""Outputs survive a loss of power, few descriptors, signals and kills."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PASSES = ("-p", "upcycle{experts=16 top-k=2}", "--to", "mixtral")


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
    moecc, dense, tmp_path, monkeypatch
):
    (dense / "tokenizer.json").write_text("{}")
    events = events_of(monkeypatch)
    out = tmp_path / "out"
    done = moecc("convert", dense, out, *PASSES, "--max-shard-bytes", "100000")
    assert done.code == 0, done.err
    renamed = next(i for i, (what, _) in enumerate(events) if what == "rename")
    temporary = Path(events[renamed][1])
    before = {path for what, path in events[:renamed] if what == "fsync"}
    files = [p.relative_to(out) for p in out.rglob("*")]
    assert {str(temporary / name) for name in files} | {str(temporary)} <= before
    assert ("fsync", str(tmp_path)) in events[renamed:]


def stopped_midway(dense, out, number):
    """Start a conversion, and signal it while its temporary folder has weights."""
    code = (
        "import os, sys, time\n"
        "from moecc.formats import writer\n"
        "from moecc.cli.main import main\n"
        "blocks = writer.row_blocks\n"
        "def slow(*args):\n"
        "    os.write(1, b'writing\\n')\n"  # one call: several threads write
        "    time.sleep(0.2)\n"
        "    return blocks(*args)\n"
        "writer.row_blocks = slow\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, "convert", str(dense), str(out), *PASSES]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(number)
    return process


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130)],
    ids=["SIGTERM", "SIGINT"],
)
def test_a_signal_leaves_nothing(dense, tmp_path, number, code):
    _, err = (process := stopped_midway(dense, tmp_path / "out", number)).communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == ["dense"]
