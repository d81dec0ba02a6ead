"""Types that help: `Any` is rare, and so is a checker that is silenced."""

from __future__ import annotations

import ast
import tokenize
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [p for d in ("moecc", "passes", "backends") for p in sorted((ROOT / d).rglob("*.py"))]
MOST_ANY, MOST_IGNORED = 150, 15


def tokens(file: Path) -> list[tokenize.TokenInfo]:
    with file.open("rb") as text:
        return list(tokenize.tokenize(text.readline))


def imported(file: Path) -> set[int]:
    """Return the lines of imports."""
    return {
        line
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }


def any_in(file: Path) -> int:
    if "Any" not in file.read_text("utf-8"):
        return 0
    lines = imported(file)
    names = [t for t in tokens(file) if t.type == tokenize.NAME and t.string == "Any"]
    return sum(t.start[0] not in lines for t in names)


def ignored_in(file: Path) -> int:
    if "type: ignore" not in file.read_text("utf-8"):
        return 0
    comments = [t.string for t in tokens(file) if t.type == tokenize.COMMENT]
    return sum("type: ignore" in text for text in comments)


@pytest.mark.parametrize(
    ("count", "most"), [(any_in, MOST_ANY), (ignored_in, MOST_IGNORED)], ids=["Any", "ignore"]
)
def test_what_no_checker_sees_is_rare(count: object, most: int) -> None:
    assert callable(count)
    found = Counter({str(p.relative_to(ROOT)): count(p) for p in FILES})
    assert found.total() < most, found.most_common(12)
