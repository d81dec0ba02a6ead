"""The page on formats quotes the receipt of a real conversion."""

from __future__ import annotations

import json

from moecc.jobs.receipt import receipt_lines

from .pages import ROOT

RECEIPT = ROOT / "docs" / "proofs" / "receipt_smollm2.json"


def test_the_page_has_the_lines_of_the_receipt() -> None:
    lines = "\n".join(receipt_lines(json.loads(RECEIPT.read_text("utf-8"))))
    assert f"```text\n{lines}\n```" in (ROOT / "docs" / "formats.md").read_text("utf-8")


def test_the_receipt_is_one_of_a_whole_model_that_was_compared() -> None:
    found = json.loads(RECEIPT.read_text("utf-8"))
    assert found["promised"]["kind"] == "reassociation"
    assert (found["unchecked"], found["verified"]["layers"]) == (None, None)
    difference = found["verified"]["difference"]["max_relative"]
    assert 0 < difference <= found["verified"]["tolerance"]
