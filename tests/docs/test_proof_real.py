"""The page on exactness quotes what real checkpoints gave."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .pages import ROOT

FOUND: dict[str, list[dict[str, Any]]] = json.loads(
    (ROOT / "docs" / "proofs" / "real.json").read_text("utf-8")
)


@pytest.mark.parametrize(("name", "bound"), [("minilm", 4.4e-7), ("smollm2", 6.5e-6)])
def test_what_promises_the_same_function_keeps_it(name: str, bound: float) -> None:
    same = [cell for cell in FOUND[name] if cell.get("promised") == "reassociation"]
    assert len(same) >= 7
    assert bound / 2 < max(cell["difference"] for cell in same) <= bound


def test_the_cells_are_as_many_as_the_page_says() -> None:
    assert len({cell["method"] for cell in FOUND["minilm"]}) == 13
    assert len({cell["target"] for cell in FOUND["smollm2"]}) == 7
    assert all(cell["exit"] == 0 for cells in FOUND.values() for cell in cells)
