"""The claims of ``docs/exactness.md``: each row is converted, and held to what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

import moecc
from moecc.ir.structure import clone
from moecc.prove import prove
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "exactness.md").read_text("utf-8")
CLAIMS = [
    [cell.strip().strip("`") for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if line.endswith(("| proved |", "| measured |"))
]


@pytest.mark.parametrize("row", CLAIMS, ids=lambda row: row[2])
def test_a_claim_is_what_a_conversion_promises_and_the_prover_finds(row: list[str]) -> None:
    _, name, pipeline, promise, evidence = row
    before = moecc.open(str(ROOT / "tests" / "golden" / name)).graph
    after = clone(before)
    done = run_pipeline(after, Pipeline.parse(pipeline), context=Context())
    kind, _, bound = promise.partition(", up to ")
    assert done.preserves.kind == kind
    assert done.preserves.up_to.startswith(bound)
    assert done.preserves.is_equality == (evidence == "proved")
    assert (prove(before, after, refute=False).status == "proved") == (evidence == "proved")


def test_claims_are_of_every_kind() -> None:
    assert {row[3].partition(",")[0] for row in CLAIMS} == {"exact", "reassociation", "approximate"}
