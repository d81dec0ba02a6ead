"""The glossary: each term has one owner, and names that were given up do not come back."""

from __future__ import annotations

import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "moecc": ROOT,
    "moecc_passes": ROOT / "passes",
    "moecc_backends": ROOT / "backends",
}

RETIRED = {
    # Operations and what makes slots.
    "placing": "assigner", "PLACING": "a trait", "place_scale": "scale_factors",
    "Placement": "SlotAssignment", "emit_placed": "emit_chosen", "is_place": "is_slots",
    # Sharding.
    "placed_types": "propagate_sharding", "misplaced": "sharding_problems",
    "is_placed": "is_sharded", "parse_placement": "parse_sharding",
    "format_placement": "format_sharding", "Spread": "GspmdLowering", "Local": "DeviceView",
    "Stated": "ExplicitShardings", "Guided": "GspmdShardings",
    # Dispatch.
    "Packing": "DispatchLayout", "RowPacking": "RowLayout", "PlacedRows": "PermutedRows",
    "Journey": "ExchangeRecord", "Hop": "ExchangeMap", "Way": "ExchangeSpec",
    "put_off": "deferred", "chosen_rows": "per_token_weights", "unused_rows": "padding_rows",
    # The rest.
    "collector_paused": "gc_paused", "kept_name": "remat_name", "placed_anew": "reassign_slots",
    "Wish": "Constraints", "Setting": "StepConfig", "Settings": "ModeConfig",
    "Place": "ProcessInfo", "place_of": "process_info", "Answer": "CompileOutcome",
    "Prepared": "PreparedJob", "WrittenPart": "GeneratedPart",
}  # fmt: skip


def terms() -> dict[str, tuple[str, str]]:
    """Return module and source of each term."""
    found: dict[str, tuple[str, str]] = {}
    for line in (ROOT / "docs/glossary.md").read_text("utf-8").splitlines():
        cells = [c.strip() for c in line.strip("|").split(" | ")]
        if len(cells) == 4 and cells[0] not in ("term",):
            name, _, module, source = cells
            assert name not in found, f"{name} stands twice"
            found[name] = (module.strip("`"), source.strip("| "))
    return found


def test_there_are_terms_in_alphabetical_order() -> None:
    names = [n.lower() for n in terms()]
    assert len(names) >= 40
    assert names == sorted(names)


@pytest.mark.parametrize("term", terms())
def test_a_term_has_an_owner_and_a_source(term: str) -> None:
    module, source = terms()[term]
    path = PACKAGES[module.split(".")[0]] / module.replace(".", "/")
    assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), module
    assert source


def names_of(path: Path) -> set[str]:
    with path.open("rb") as file:
        return {t.string for t in tokenize.tokenize(file.readline) if t.type == tokenize.NAME}


def test_names_that_were_given_up_do_not_come_back() -> None:
    back = {
        f"{path.relative_to(ROOT)}: {name}": f"now {RETIRED[name]}"
        for folder in ("moecc", "passes", "backends", "examples", "benchmarks", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if path != Path(__file__)
        for name in names_of(path) & RETIRED.keys()
    }
    assert back == {}


def test_no_module_has_a_retired_name() -> None:
    retired = re.compile(
        r"/(placing|kept|collector|pages|quiet|regions|flow|spread|lower_moe|lower_plain|packing)\.py$"
    )
    found = [str(p) for d in ("moecc", "passes", "backends") for p in (ROOT / d).rglob("*.py")]
    assert [p for p in found if retired.search(p)] == []
