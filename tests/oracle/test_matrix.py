"""Runs and cells of the record, which stay proved."""

from __future__ import annotations

import json

import pytest

from .matrix import RECORD, cell_named, run_cell, run_pair


def proofs(kind: str) -> list[tuple[float, list[str]]]:
    """Return the proofs of the record, each as its seconds and the words of its job."""
    rows = json.loads(RECORD.read_text("utf-8"))["rows"]
    return [
        (seconds, job.split(" | ")[1:])
        for job, (verdict, seconds) in rows.items()
        if job.startswith(f"{kind} | ") and verdict == "proved"
    ]


def proved(kind: str) -> list[tuple[str, ...]]:
    """Return the quickest proof of the record of every pipeline, or of every target and method."""
    quickest: dict[str, tuple[str, ...]] = {}
    for _, (source, *words) in sorted(proofs(kind)):
        for word in words:
            quickest.setdefault(word, (source, *words))
    return [*dict.fromkeys(quickest.values())]


@pytest.mark.parametrize("job", proved("run"), ids=" ".join)
def test_a_run_is_proved(job):
    row = run_pair(*job)
    assert (row.verdict, row.reason) == ("proved", "")


@pytest.mark.parametrize("words", [words for _, words in proofs("cell")[::10]], ids=" ".join)
def test_a_cell_is_proved(words):
    """Every tenth, slow proofs as well as quick; test_checker.py has every target and method."""
    row = run_cell(cell_named(*words))
    assert (row.verdict, row.reason) == ("proved", "")
