"""Commands of pages that install and download, in a fresh clone; what they install is needed after.

`make test` itself, and what contains it, is what `.ci/run` runs in its clone.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .pages import PAGES, ROOT, blocks
from .test_page_commands import IN_A_CLONE, lines

TESTS = ("make test", "make check", "make test-all", "make bench")
"""They run the tests or take hours: that there is such a target is tested."""

OWN = "pip install '.["
"""Into an environment of the user's own."""

LINES = list(dict.fromkeys(x.partition("  #")[0].strip() for p in PAGES for x in lines(p)))
FIRST_HOUR = next(b for b in blocks("bash") if "make install && . .venv" in b.text)


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("make ")])
def test_targets_are_there(line):
    line = line.partition(" && ")[0]
    done = subprocess.run([*line.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """Return a clone of the repository, with nothing installed; skips where that cannot be."""
    folder = tmp_path_factory.mktemp("clone") / "moecc"
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone itself")
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    made = shell("make --silent install", folder)
    if made.returncode:
        pytest.skip(f"the packages cannot be had: {made.stderr[-300:]}")
    return folder


def shell(text, folder):
    """Run lines as a reader types them: in the folder, with the interpreter of this machine."""
    unset = ("VIRTUAL_ENV", "PYTHONPATH", "XLA_FLAGS", "PYTEST_CURRENT_TEST")
    environ = {name: value for name, value in os.environ.items() if name not in unset}
    first = str(Path(sys.executable).parent)
    environ["PATH"] = os.pathsep.join(
        part for part in environ["PATH"].split(os.pathsep) if part != first
    )
    return subprocess.run(
        ["bash", "-e", "-c", text], cwd=folder, env=environ, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.download
@pytest.mark.parametrize("block", [FIRST_HOUR], ids=str)
def test_the_first_hour(block, clone):
    """As one session; what it ends with is a sentence that goes on."""
    done = shell(block.text, clone)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "the force that" in done.stdout


@pytest.mark.slow
@pytest.mark.download
@pytest.mark.parametrize(
    "line",
    [x for x in LINES if IN_A_CLONE.match(x) and x not in (*TESTS, *FIRST_HOUR.text.splitlines())
     and not re.match("make install|" + re.escape(OWN), x)],
)  # fmt: skip
def test_commands_run_in_a_clone(line, clone):
    done = shell(f". .venv/bin/activate\n{line}", clone)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
