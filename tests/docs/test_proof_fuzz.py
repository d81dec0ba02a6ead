"""The page on promises has the numbers of the last proof with hostile inputs."""

from __future__ import annotations

import json
from typing import Any

from .pages import ROOT

PROOF = ROOT / "docs" / "proofs" / "fuzz.json"


def text(found: dict[str, Any]) -> str:
    """Return what the page says of a proof."""
    commands = found["commands"]
    (each,) = {g["executions"] for g in found["grammars"].values()}
    slowest = max(found["slowest_seconds"], commands["slowest_seconds"])
    peak = max(found["peak_memory_bytes"], commands["peak_memory_bytes"])
    return (
        f"On {found['date']}, {found['machine']}: {found['executions']:,} executions, {each:,} of "
        f"each grammar, and {commands['commands']:,} commands; {len(found['failures'])} failures. "
        f"The slowest took {slowest:.1f} seconds, a process was at most {peak / 2**20:.0f} MiB "
        "large."
    )


def test_the_page_has_the_numbers_of_the_proof() -> None:
    page = " ".join((ROOT / "docs" / "promises.md").read_text("utf-8").split())
    assert text(json.loads(PROOF.read_text("utf-8"))) in page


def test_the_proof_is_as_large_as_it_has_to_be() -> None:
    found = json.loads(PROOF.read_text("utf-8"))
    assert found["failures"] == []
    assert found["executions"] >= 1_000_000
    assert len(found["grammars"]) == 15
    assert min(g["executions"] for g in found["grammars"].values()) >= 50_000
    assert found["commands"]["commands"] >= 5_000
    assert "70" not in found["commands"]["exit_codes"]
    assert max(found["slowest_seconds"], found["commands"]["slowest_seconds"]) < 5
