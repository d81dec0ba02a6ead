"""Sixty cells of the table of sources, targets and methods; ``make proof-table`` runs them all."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from .cells import DENSE, METHODS, MIXTURES, OVER_MIXTURES, TARGETS, Cell, cells, run

PAGE = Path(__file__).parents[2] / "docs" / "proof-table.md"


def stated() -> Iterator[tuple[Cell, str]]:
    """Yield every cell with its sign in the page."""
    text = PAGE.read_text()
    rows = {}
    for title, part in re.findall(r"^### (.*)\n([^#]*)", text, re.MULTILINE):
        lines = [
            [c.strip() for c in line.split("|")[1:-1]] for line in part.splitlines() if "|" in line
        ]
        rows.update({(title, line[0]): dict(zip(lines[0], line, strict=True)) for line in lines})
    for cell in cells():
        title = f"To {cell.target}" if cell.source in DENSE else "Over mixtures"
        yield cell, rows[title, f"`{cell.family}`"][cell.method].split()[0]


def drawn() -> list[tuple[Cell, str]]:
    """Return sixty cells, twenty of each sign."""
    chance, found = random.Random(20), list(stated())
    return [
        pair for sign in "=≈—" for pair in chance.sample([p for p in found if p[1] == sign], 20)
    ]


def test_the_table_is_wide() -> None:
    assert len(DENSE) >= 16
    assert len(TARGETS) >= 12
    assert len({*METHODS, *OVER_MIXTURES}) >= 12
    assert len(MIXTURES) >= 10


@pytest.mark.parametrize(
    ("cell", "sign"),
    [pytest.param(c, s, id=f"{c.source}-{c.target}-{c.method}") for c, s in drawn()],
)
def test_a_cell_is_what_the_page_says(cell: Cell, sign: str) -> None:
    assert run(cell).kind == sign
