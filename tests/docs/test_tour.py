"""The shell sessions of the pages are run, and print what the pages say."""

import re

import pytest

from tests.support.tiers import few

from .pages import ROOT, blocks_of
from .sessions import commands, environment, fits, run_block

SESSIONS = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("tour", "proving"))]
JOBS = ROOT / "docs" / "jobs.md"
_OUTPUT = re.compile(r"^moecc (?:convert \S+|.* (?:-o|--(?:out|save|outputs))) ([^\s/-]\S*)")


def test_what_fits():
    assert fits(["a … c"], ["a b c"])
    assert fits(["a", "…", "c"], ["a", "b", "b", "c"])
    assert not fits(["a … c"], ["a b d"])
    assert not fits(["a"], ["a", "b"])
    assert fits([], [])
    assert not fits([], ["a"])


def test_no_session_writes_what_another_wrote():
    """A reader runs one page after the other in one folder, where an output is not replaced."""
    written = {}
    for page in [*SESSIONS, JOBS]:
        for block in blocks_of(page):
            for command, _ in commands(block) if block.info == "console" else []:
                for name in _OUTPUT.findall(command):
                    assert name not in written, f"{page.name} writes {name} of {written.get(name)}"
                    written[name] = page.name
    assert len(written) > 20


@pytest.mark.parametrize("page", few([*SESSIONS, JOBS]), ids=lambda p: p.name)
def test_sessions(page, tmp_path):
    for name in ("tests", "examples", "docs", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    for block in blocks_of(page):
        run_block(block, tmp_path, environment())
