"""The part of ``docs/ir.md`` that is written from the operation table is current."""

from __future__ import annotations

from pathlib import Path

import pytest

from moecc.errors import InputError
from moecc.ir.docs import OPERATIONS, render_operations
from moecc.ir.operation import OPS

PAGE = Path(__file__).parents[2] / "docs" / "ir.md"


def test_the_page_has_the_operations_as_they_are() -> None:
    page = PAGE.read_text("utf-8")
    assert OPERATIONS.replace(page) == page, "run: make docs"


def test_every_operation_and_attribute_has_its_row() -> None:
    text = render_operations()
    for entry in OPS.values():
        signatures = [line for line in text.splitlines() if f"{entry.name} %" in line]
        assert signatures or f"| `{entry.name} {{…}}` |" in text
        for name in entry.attrs:
            assert text.count(f"| `{entry.name}` | `{name}` |") == 1


@pytest.mark.parametrize(
    ("operation", "mixed"),
    [
        ("silu", ""),
        ("contract", "those of `over`"),
        ("assign_slots", "all"),
        ("combine", "`group`, `expert`, `slot`, the `tokens` of its `assign_slots`"),
    ],
)
def test_a_row_says_what_is_mixed(operation: str, mixed: str) -> None:
    rows = [line.split(" | ") for line in render_operations().splitlines()]
    found = [r[2] for r in rows if len(r) == 4 and f"{operation} %" in r[0]]
    assert [cell.strip() for cell in found] == [mixed]


def test_a_page_without_markers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no markers for the part 'operations'"):
        OPERATIONS.replace(f"# a page\n{OPERATIONS.end}\n{OPERATIONS.begin}\n")
    page = tmp_path / "page.md"
    page.write_text("# a page\n")
    assert OPERATIONS.main([str(page)]) == 1
    assert page.read_text() == "# a page\n"


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{OPERATIONS.begin}\nold\n{OPERATIONS.end}\nafter\n")
    assert OPERATIONS.main([str(page)]) == 0
    text = page.read_text("utf-8")
    assert text.startswith(f"before\n{OPERATIONS.begin}\n")
    assert text.endswith(f"\n{OPERATIONS.end}\nafter\n")
    assert render_operations() in text
    assert "old" not in text.splitlines()
