"""What z3 checks are statements of lemmas: of all that are about choices, slots and indices."""

from __future__ import annotations

import ast
import json
from pathlib import Path

from moecc.prove.rules import APPLICATIONS

RECORD = Path(__file__).parents[2] / "docs" / "proofs" / "z3.json"
SOURCE = Path(__file__).with_name("z3_lemmas.py")

SUBJECTS = ("experts", "share", "div", "mod", "range", "token_of")
"""Heads whose lemmas are about choices, ties, slots and indices."""

ELSEWHERE = {"range", "slots of a shard"}
"""Lemmas that compare bounds alone, and one that tests/prove evaluates beside the reference."""


def statements() -> set[str]:
    """Return the names of the statements, without z3, which need not be installed."""
    for node in ast.parse(SOURCE.read_text("utf-8")).body:
        is_table = isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "STATEMENTS"
        if is_table and isinstance(node.value, ast.Dict):
            return {ast.literal_eval(key) for key in node.value.keys if key is not None}
    raise AssertionError("no table of statements")


def test_lemmas_of_choices_and_indices_have_a_statement():
    names = {x.name for head in SUBJECTS for x in APPLICATIONS[head]}
    assert names - statements() == ELSEWHERE


def test_the_record_has_every_statement_without_a_counterexample():
    record = json.loads(RECORD.read_text("utf-8"))
    assert record["statements"].keys() == statements()
    assert not any(s["counterexamples"] for s in record["statements"].values())
    assert all(v["refuted"] for v in record["variants"].values())
