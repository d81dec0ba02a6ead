"""Pages are read in terminals: prose has at most 100 columns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .pages import PAGES, ROOT

COLUMNS = 100


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Yield lines with their numbers, without tables, fences, pictures and generated parts."""
    fenced = generated = False
    for number, line in enumerate(text.splitlines(), 1):
        fence = line.lstrip().startswith("```")
        fenced ^= fence
        generated = line.startswith("<!-- begin") or (generated and line[:8] != "<!-- end")
        if not (fenced or fence or generated or line.startswith(("|", "    ", "![", "<!--"))):
            yield number, line


@pytest.mark.parametrize(
    "page",
    [*(p for p in PAGES if p.name != "passes.md"), ROOT / "CHANGELOG.md"],
    ids=lambda p: p.name,
)
def test_prose_is_within_the_columns(page: Path) -> None:
    text = page.read_text("utf-8")
    assert [n for n, line in prose(text) if len(line) > COLUMNS] == []


def test_a_long_line_is_found() -> None:
    text = f"{'x' * 101}\n| {'x' * 101} |\n```\n{'x' * 101}\n```\n{'y' * 101}"
    assert [n for n, _ in prose(text)] == [1, 6]
