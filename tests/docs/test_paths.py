"""Files and links that the pages name exist."""

import re

import pytest

from .pages import PAGES, ROOT

FILE = re.compile(r"`((?:moecc|passes|backends|tests|docs|examples|benchmarks|\.ci)/[\w./-]*)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
TO_BE_WRITTEN = re.compile(r"NAME|fold_scale")
"""Parts of the names of files that a reader of a page writes."""
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def anchor(heading):
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_that_a_page_names_exist(page):
    files = {f for f in FILE.findall(page.read_text("utf-8")) if not TO_BE_WRITTEN.search(f)}
    assert {f for f in files if not (ROOT / f).exists()} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_of_a_page_lead_somewhere(page):
    for link in LINK.findall(page.read_text("utf-8")):
        if link.startswith(("http", "mailto")):
            continue
        file, _, fragment = link.partition("#")
        target = (page.parent / file) if file else page
        assert target.exists(), link
        if fragment and target.suffix == ".md":
            headings = map(anchor, HEADING.findall(target.read_text("utf-8")))
            assert fragment in set(headings), link
