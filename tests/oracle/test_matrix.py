"""Runs and cells of the record, which stay proved; ``make proof-equal`` proves all of them."""

from __future__ import annotations

import json

import pytest
from tiers import few

from .matrix import RECORD, Row, cell_named, run_cell, run_pair

QUICK_SECONDS = 0.12
"""Runs that took the prover longer are left to ``make proof-equal``."""


def proved(kind: str) -> list[tuple[str, ...]]:
    """Return up to sixty runs or cells of the record that were proved, the quick ones."""
    rows = json.loads(RECORD.read_text("utf-8"))["rows"]
    jobs = [
        tuple(job.split(" | "))[1:]
        for job, (verdict, seconds) in rows.items()
        if job.startswith(f"{kind} | ") and verdict == "proved" and seconds <= QUICK_SECONDS
    ]
    return jobs[:60]


def verdict_of(row: Row) -> tuple[str, str]:
    return row.verdict, row.reason


@pytest.mark.parametrize("job", few(proved("run"), 60), ids=" ".join)
def test_a_run_is_proved(job: tuple[str, str]) -> None:
    assert verdict_of(run_pair(*job)) == ("proved", "")


@pytest.mark.parametrize("job", few(proved("cell"), 60), ids=" ".join)
def test_a_cell_is_proved(job: tuple[str, str, str]) -> None:
    assert verdict_of(run_cell(cell_named(*job))) == ("proved", "")
