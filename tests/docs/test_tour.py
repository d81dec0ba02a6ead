"""The shell sessions of the pages are run, and print what the pages say."""

import pytest

from tests.support.tiers import few

from .pages import ROOT, blocks_of
from .sessions import environment, fits, run_block

SESSIONS = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("tour", "proving"))]
JOBS = ROOT / "docs" / "jobs.md"


def test_what_fits():
    assert fits(["a … c"], ["a b c"])
    assert fits(["a", "…", "c"], ["a", "b", "b", "c"])
    assert not fits(["a … c"], ["a b d"])
    assert not fits(["a"], ["a", "b"])
    assert fits([], [])
    assert not fits([], ["a"])


@pytest.mark.parametrize("page", few([*SESSIONS, JOBS]), ids=lambda p: p.name)
def test_sessions(page, tmp_path):
    for name in ("tests", "examples", "docs", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    for block in blocks_of(page):
        run_block(block, tmp_path, environment())
