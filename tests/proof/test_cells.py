"""Sixty cells of the table of sources, targets and methods; ``make proof-table`` runs them all."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from .cells import DENSE, METHODS, MIXTURES, OVER_MIXTURES, TARGETS, Cell, cells, run

PAGE = Path(__file__).parents[2] / "docs" / "proof-table.md"
SIXTY = random.Random(20).sample(cells(), 60)


def test_the_table_is_wide() -> None:
    assert len(DENSE) >= 16
    assert len(TARGETS) >= 12
    assert len({*METHODS, *OVER_MIXTURES}) >= 10
    assert len(MIXTURES) >= 10


@pytest.mark.parametrize("cell", SIXTY, ids=lambda c: f"{c.source}-{c.target}-{c.method}")
def test_a_cell_is_what_the_page_says(cell: Cell) -> None:
    assert run(cell).kind == stated(cell)


def stated(cell: Cell) -> str:
    """Return the sign of a cell in the page."""
    is_dense = cell.source in DENSE
    title = f"### To {cell.target}" if is_dense else "### Over mixtures"
    part = PAGE.read_text().partition(f"{title}\n")[2].partition("\n### ")[0]
    rows = [re.split(r" *\| *", line.strip("| ")) for line in part.splitlines() if "|" in line]
    row = next(row for row in rows if row[0] == f"`{cell.family}`")
    return row[rows[0].index(cell.method)].split()[0]
