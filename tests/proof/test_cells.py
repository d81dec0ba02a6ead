"""Eighteen cells of the table of sources, targets and methods; ``make proof-table`` runs all."""

import json
import random
from pathlib import Path

import pytest

from .cells import cells, run

RECORD = Path(__file__).parents[2] / "docs" / "proofs" / "table.json"


def stated():
    """Yield every cell with its sign in the record."""
    results = json.loads(RECORD.read_text())["cells"]
    for cell in cells():
        yield cell, results[cell.source][cell.target][cell.method][0]


def drawn():
    """Return eighteen cells, six of each sign."""
    chance, stated_cells = random.Random(20), list(stated())
    return [
        pair
        for sign in "=≈—"
        for pair in chance.sample([p for p in stated_cells if p[1] == sign], 6)
    ]


@pytest.mark.parametrize(
    ("cell", "sign"),
    [pytest.param(c, s, id=f"{c.source}-{c.target}-{c.method}") for c, s in drawn()],
)
def test_a_cell_is_what_the_record_says(cell, sign):
    assert run(cell).kind == sign
