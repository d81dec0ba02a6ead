"""The page on interrupted conversions has the numbers of the last proof."""

from __future__ import annotations

import json
from typing import Any

from .pages import ROOT

PROOF = ROOT / "docs" / "proofs" / "kills.json"


def line(found: dict[str, Any]) -> str:
    """Return what the page says of a proof."""
    return (
        f"On {found['date']}, {found['machine']}: {found['killed']:,} kills and losses of power, "
        f"{found['ended']:,} signals and full disks, {found['raced']:,} races of four writers; "
        f"{len(found['failures'])} failures."
    )


def test_the_page_has_the_numbers_of_the_proof() -> None:
    found = json.loads(PROOF.read_text())
    assert found["failures"] == []
    page = " ".join((ROOT / "docs" / "interrupted.md").read_text().split())
    assert line(found) in page


def test_the_proof_covers_what_the_page_says() -> None:
    points = json.loads(PROOF.read_text())["points"]
    for how in ("kill", "power all", "power data", "power some"):
        for name in ("fresh", "--force", *(f"--resume after {n}%" for n in (30, 60, 90))):
            assert points[f"{how}: out {name}"] > 50
        assert points[f"{how}: m.gguf fresh"] > 50
        assert points[f"{how}: m.gguf --force"] > 50
