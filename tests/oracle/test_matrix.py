"""Runs of the record, which stay proved; its cells are proved for the checker (test_checker.py)."""

from __future__ import annotations

import json

import pytest

from .matrix import RECORD, run_pair


def proved(kind: str) -> list[tuple[str, ...]]:
    """Return the quickest proof of the record of every pipeline, or of every target and method."""
    rows = json.loads(RECORD.read_text("utf-8"))["rows"]
    proofs = [
        (seconds, job.split(" | ")[1:])
        for job, (verdict, seconds) in rows.items()
        if job.startswith(f"{kind} | ") and verdict == "proved"
    ]
    quickest: dict[str, tuple[str, ...]] = {}
    for _, (source, *words) in sorted(proofs):
        for word in words:
            quickest.setdefault(word, (source, *words))
    return [*dict.fromkeys(quickest.values())]


@pytest.mark.parametrize("job", proved("run"), ids=" ".join)
def test_a_run_is_proved(job):
    row = run_pair(*job)
    assert (row.verdict, row.reason) == ("proved", "")
