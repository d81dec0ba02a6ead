"""The site of the documentation: it is built strictly, has every page, and loads nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_the_index_and_the_site_name_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    site = (ROOT / "mkdocs.yml").read_text("utf-8")
    linked = set(re.findall(r"\]\(([\w-]+\.md)", index)) | {"index.md"}
    assert linked == set(PAGES)
    assert set(re.findall(r": ([\w-]+\.md)$", site, re.MULTILINE)) == set(PAGES)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs the extra docs")
def test_the_site_is_built_and_loads_nothing(tmp_path: Path) -> None:
    """Strictly: a link to a page, or to a place in one, that is not there is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for page in PAGES:
        text = (tmp_path / page).with_suffix(".html").read_text("utf-8")
        loaded = re.findall(
            r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?(https?:[^\" >]*)", text
        )
        assert loaded == [], page
