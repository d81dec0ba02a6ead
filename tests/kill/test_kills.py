"""A conversion that is ended at any write, synchronisation or rename can be continued."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def prove(*options):
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill.prove", *options],
        capture_output=True, text=True, timeout=3000, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_some_points():
    found = prove("--sample", "3", "--how", "power some")
    assert found["failures"] == []
    assert found["killed"] == 21


def test_outputs_change_the_disk_through_one_module():
    changing = re.compile(
        r"\bos\.(rename|replace|unlink|remove|rmdir|mkdir|makedirs|fsync|pwrite|"
        r"write|ftruncate|truncate|chmod)\(|shutil\.(?!disk_usage)|"
        r"\.(write_bytes|write_text|mkdir|unlink|rmdir|rename)\((?!\")"
    )
    files = [
        *(ROOT / "moecc" / "formats").glob("*.py"),
        ROOT / "moecc/jobs/convert.py",
        ROOT / "moecc/jobs/receipt.py",
    ]
    found = {
        (file.name, match[0])
        for file in files
        # A store's mirror and the name of a writer to it are in folders of their own.
        if file.name not in ("files.py", "store.py", "upload.py")
        for match in changing.finditer(re.sub(r"disk\(\)\.\w+\(", "", file.read_text()))
    }
    # An empty folder that was made a moment before; it is in no state that anyone waits for.
    assert found == {("output.py", "os.rmdir(")}


@pytest.mark.slow
def test_every_point():
    found = prove()
    assert found["failures"] == []
    assert found["points"]["kill: out fresh"] > 100
    assert found["points"]["power all: out --force"] > 100


@pytest.mark.slow
def test_trainings_at_some_points():
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill.trainings", "--kills", "6"],
        capture_output=True, text=True, timeout=3000, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests" / "support")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for name, result in json.loads(done.stdout)["storages"].items():
        assert result["kills"] >= 4, name
        assert result["resumed"] > 0, name
