"""Runs of the record, which stay proved; its cells are proved for the checker (test_checker.py)."""

from __future__ import annotations

import json

import pytest

from .matrix import RECORD, run_pair

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


@pytest.mark.parametrize("job", proved("run"), ids=" ".join)
def test_a_run_is_proved(job):
    row = run_pair(*job)
    assert (row.verdict, row.reason) == ("proved", "")
