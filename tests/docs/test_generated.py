"""The part of ``docs/ir.md`` that is written from the operation table is current."""

from __future__ import annotations

from pathlib import Path

import pytest

from moecc.errors import InputError
from moecc.ir.docs import OPERATIONS

PAGE = Path(__file__).parents[2] / "docs" / "ir.md"


def test_the_page_has_the_operations_as_they_are() -> None:
    page = PAGE.read_text("utf-8")
    assert OPERATIONS.replace(page) == page, "run: make docs"


def test_a_page_without_markers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no markers for the part 'operations'"):
        OPERATIONS.replace(f"# a page\n{OPERATIONS.end}\n{OPERATIONS.begin}\n")
    page = tmp_path / "page.md"
    page.write_text("# a page\n")
    assert OPERATIONS.main([str(page)]) == 1
    assert page.read_text() == "# a page\n"
