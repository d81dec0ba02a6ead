"""The files that the pages name are there, and links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from moecc_backends.reference.arrays import MEANINGS
from moecc_backends.reference.backend import ReferenceBackend

from moecc.ir import OPS

from .pages import PAGES, ROOT

_FILE = re.compile(r"`((?:moecc|passes|backends|tests|docs|examples|benchmarks|\.ci)/[\w./-]*)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_named_files_are_there(page: Path) -> None:
    named = {n for n in _FILE.findall(page.read_text("utf-8")) if "NAME" not in n}
    # The tutorial names the file that its reader is going to write.
    missing = {n for n in named if not (ROOT / n).exists() and "fold_scale" not in n}
    assert missing == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(page.read_text("utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            headings = _HEADING.findall(target.read_text("utf-8"))
            assert anchor in {_anchor(h) for h in headings}, link


def _anchor(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_operation_has_a_meaning() -> None:
    assert ReferenceBackend.name == "reference"
    assert set(OPS) <= set(MEANINGS)


def test_every_operation_has_a_lowering() -> None:
    pytest.importorskip("jax")
    from moecc_backends.xla.backend import XlaBackend
    from moecc_backends.xla.trace.context import LOWERINGS

    assert XlaBackend.name == "xla"
    assert set(OPS) <= set(LOWERINGS)
