"""Counts in reports: one of a thing is not several."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from moecc.jobs.evaluate import ModelEvaluation as Evaluated
from moecc.jobs.evaluate import SetScore, evaluation_text
from moecc.train.scoring import RowScores


def test_one_duplicate(moecc: Callable, tmp_path: Path) -> None:
    text = tmp_path / "x.txt"
    text.write_text("one\none\ntwo\n")
    made = moecc(
        "tokens", text, "--split", "line", "--tokenizer", "bytes", "--out", tmp_path / "ids"
    )
    assert "  1 duplicate was left out" in made.out


def test_one_token() -> None:
    rows = RowScores(np.ones(1), np.ones(1, int), np.ones(1, int))
    found = Evaluated("m", {"x": SetScore("documents", rows)}, {})
    assert evaluation_text([found]).endswith("loss 1.0000, 1 token")
