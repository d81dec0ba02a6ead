"""The page on exactness quotes what real checkpoints gave."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .pages import ROOT

FOUND: dict[str, list[dict[str, Any]]] = json.loads(
    (ROOT / "docs" / "proofs" / "real.json").read_text("utf-8")
)


PAGE = (ROOT / "docs" / "exactness.md").read_text("utf-8")
DIGITS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


@pytest.mark.parametrize(
    ("name", "bound", "least"),
    [
        ("minilm", 4.4e-7, 7),
        ("smollm2", 6.5e-6, 7),
        ("whisper-base", 1.8e-6, 7),
        ("all-mpnet-base-v2", 2.1e-6, 7),
        ("gemma-3-270m", 7.5e-6, 7),
    ],
)
def test_what_promises_the_same_function_keeps_it(name: str, bound: float, least: int) -> None:
    same = [cell for cell in FOUND[name] if cell.get("promised") == "reassociation"]
    assert len(same) >= least
    assert bound / 2 < max(cell["difference"] for cell in same) <= bound


def test_the_cells_are_as_many_as_the_page_says() -> None:
    methods = {name: {c["method"] for c in FOUND[name] if "exit" in c} for name in FOUND}
    assert {len(found) for found in methods.values()} == {13}
    assert len({c["target"] for c in FOUND["smollm2"] if c["method"] == "copy"}) == 7
    assert not any(cell.get("exit") for cells in FOUND.values() for cell in cells)


@pytest.mark.parametrize("name", ["smollm2", "all-mpnet-base-v2", "whisper-base", "gemma-3-270m"])
def test_the_page_says_how_far_transformers_is_from_moecc(name: str) -> None:
    (cell,) = (c for c in FOUND[name] if c["target"] == "transformers")
    assert cell["missing_keys"] == cell["unexpected_keys"] == cell["mismatched_keys"] == []
    keys = ("difference_float64", "difference_float32", "transformers_float32")
    assert f"| {' | '.join(shown(cell[key]) for key in keys)} |" in PAGE


def shown(number: float) -> str:
    digits, exponent = f"{number:.1e}".split("e")
    return f"{digits}·10{str(int(exponent)).translate(DIGITS)}"
