"""The page on exactness quotes what splits and pruning of SmolLM2 cost."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .pages import ROOT

FOUND: dict[str, Any] = json.loads((ROOT / "docs" / "proofs" / "splits.json").read_text("utf-8"))
PAGE = " ".join((ROOT / "docs" / "exactness.md").read_text("utf-8").split())

ROWS = {
    "dense": "dense",
    "`split=index`": "index",
    "`split=random`": "random",
    "`split=activation`, a drawn router": "activation, a drawn router",
    "`split=activation router-init=ridge`": "activation, ridge",
    "`split=activation router-init=centroids`": "activation, centroids",
}
"""The rows of the table, and what the proof calls them."""


@pytest.mark.parametrize("row", ROWS)
def test_the_table_has_what_was_measured(row: str) -> None:
    found = FOUND["splits"][ROWS[row]]
    assert f"| {row} | {found['loss']:.3f} | {found['perplexity']:,.0f} |" in PAGE


@pytest.mark.parametrize("by", ["saliency", "share", "draw", "draw, seed 1", "draw, seed 2"])
def test_the_page_says_what_pruning_costs(by: str) -> None:
    found = FOUND["pruned"][by]["against_first"]
    assert f"{found['difference']:.3f} ({found['low']:.3f} to {found['high']:.3f})" in PAGE


def test_the_page_says_what_was_read() -> None:
    assert f"{FOUND['splits']['dense']['tokens']:,} tokens" in PAGE
    assert f"statistics of {FOUND['captured tokens']:,} others" in PAGE
