"""The recipes that are shipped, as steps for machines that are not here."""

import json

import pytest

from .chain import ROOT
from .recipes import BOUNDS, CASES, off

PROOF = ROOT / "docs" / "proofs" / "recipes.jsonl"


def test_every_recipe_is_compiled_for_both_machines():
    shipped = {path.stem for path in (ROOT / "moecc" / "presets" / "recipes").glob("*.toml")}
    for end in ("-v5p", "-h100"):
        assert {case.recipe for name, case in CASES.items() if name.endswith(end)} == shipped


LINES = [json.loads(line) for line in PROOF.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line["case"])
def test_a_plan_is_within_the_bounds_of_what_was_compiled(line):
    beyond = {k: far for k, (_, far) in off(line).items() if abs(far or 0.0) > BOUNDS[k]}
    assert beyond == {}
