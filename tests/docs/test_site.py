"""The site of the documentation: it is built strictly, has every page, and loads nothing."""

import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

NEEDS_MKDOCS = pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs the extra docs")

ROOT = Path(__file__).parents[2]
PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_the_index_and_the_site_name_every_page():
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    site = (ROOT / "mkdocs.yml").read_text("utf-8")
    linked = set(re.findall(r"\]\(([\w-]+\.md)", index)) | {"index.md"}
    assert linked == set(PAGES)
    assert set(re.findall(r": ([\w-]+\.md)$", site, re.MULTILINE)) == set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_the_site_reads_every_fence_as_one(page):
    hooks = runpy.run_path(str(ROOT / "docs" / "site" / "hooks.py"))
    text = hooks["on_page_markdown"]((ROOT / "docs" / page).read_text("utf-8"))
    fences = [line.strip() for line in text.splitlines() if line.startswith("```")]
    assert len(fences) % 2 == 0
    for opening, closing in zip(fences[::2], fences[1::2], strict=True):
        assert re.fullmatch(r'```[a-z]*( title="[\w./]+")?', opening)
        assert closing == "```"


@pytest.mark.parametrize("page", PAGES)
def test_a_list_follows_a_blank_line(page):
    """Without it the site shows text, and GitHub a list where a sentence begins a line by `1.`."""
    text = (ROOT / "docs" / page).read_text("utf-8")
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    item = r"(?:[*+-]|[0-9]+\.) "
    assert re.findall(rf"^(?! |#|{item}).+\n{item}.*", text, re.MULTILINE) == []


def test_a_page_keeps_its_text_on_narrow_screens():
    hooks = runpy.run_path(str(ROOT / "docs" / "site" / "hooks.py"))
    cell = f"<td><code>moecc.families.reader.Reader</code> {'word ' * 30}</td>"
    article = f"<article><pre>--a</pre><p>with --quiet</p><table><td>1</td>{cell}</table></article>"
    page = hooks["on_post_page"](f"<p>--b</p>{article}<p>--c</p>")
    assert re.sub("<[^>]+>", "", page) == re.sub("<[^>]+>", "", f"--b{article}--c")
    assert page.count('<span class="word">') == 1
    assert "<pre>--a</pre>" in page
    assert "<td>1</td><td class=long><code>moecc.<wbr>families.<wbr>reader.<wbr>Reader" in page


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site, strictly: a link to a page, or to a place in one, that is not there fails."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@NEEDS_MKDOCS
def test_the_site_loads_nothing(site):
    for page in PAGES:
        text = (site / page).with_suffix(".html").read_text("utf-8")
        loaded = re.findall(
            r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?(https?:[^\" >]*)", text
        )
        assert loaded == [], page
        assert "```" not in text, page
