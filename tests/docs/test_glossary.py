"""The glossary: each term has one owner, and names that were given up do not come back."""

from __future__ import annotations

import functools
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("moecc", "passes", "backends", "examples", "experiments", "benchmarks", "tests")
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
    "Prepared": "PreparedJob", "WrittenPart": "GeneratedPart", "check_wish": "check_constraints",
    "wish": "constraints", "compile_apart": "compile_in_subprocess",
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


RETIRED_PHRASES = (
    r"\bis told\b",
    r"\bthe own\b",
    r"\blies? (whole|split|in parts)\b",
    r"\blies elsewhere\b",
    r"\bsums? (not yet|still to be) carried out\b",
    r"\bthe text cannot say\b",
    r"\bwhat cannot be\b",
    r"\bhardly what anyone\b",
    r"\bwhere there is none\b",
    r"\bis refused\b",
)
"""Phrases that are given up in docstrings, comments and messages, as regular expressions."""

CLEAN = ("moecc", "passes", "backends")
"""Where none of the phrases stands: everywhere."""


_ANY_NAME = re.compile("|".join(map(re.escape, RETIRED)))
"""Whatever is a retired name contains one: most files need not be taken apart."""


@functools.cache
def names_of(path: Path) -> set[str]:
    if not _ANY_NAME.search(path.read_text("utf-8")):
        return set()
    with path.open("rb") as file:
        return {t.string for t in tokenize.tokenize(file.readline) if t.type == tokenize.NAME}


def test_names_that_were_given_up_do_not_come_back() -> None:
    back = {
        f"{path.relative_to(ROOT)}: {name}": f"now {RETIRED[name]}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if path != Path(__file__)
        for name in names_of(path) & RETIRED.keys()
    }
    assert back == {}


def test_no_module_has_a_retired_name() -> None:
    retired = re.compile(
        r"/(placing|kept|collector|pages|quiet|regions|spread|lower_moe|lower_plain|packing|flow|flows)"
        r"\.py$"
    )
    found = [str(p) for d in ("moecc", "passes", "backends") for p in (ROOT / d).rglob("*.py")]
    assert [p for p in found if retired.search(p)] == []


_ANY_PHRASE = re.compile("|".join(RETIRED_PHRASES), re.IGNORECASE)


@functools.cache
def texts_of(path: Path) -> list[str]:
    """Return the string literals and comments of a file, each on one line; none if all are fine."""
    if not _ANY_PHRASE.search(" ".join(path.read_text("utf-8").split())):
        return []
    with path.open("rb") as file:
        tokens = [
            t.string
            for t in tokenize.tokenize(file.readline)
            if t.type in (tokenize.STRING, tokenize.COMMENT)
        ]
    return [" ".join(t.split()) for t in tokens]


@pytest.mark.parametrize("phrase", RETIRED_PHRASES)
def test_phrases_that_were_given_up_do_not_come_back(phrase: str) -> None:
    retired = re.compile(phrase, re.IGNORECASE)
    back = [
        f"{path.relative_to(ROOT)}: {text[max(found.start() - 40, 0) : found.end() + 40]}"
        for folder in CLEAN
        for path in (ROOT / folder).rglob("*.py")
        for text in texts_of(path)
        if (found := retired.search(text))
    ]
    assert back == []


def test_a_phrase_is_found_across_lines(tmp_path: Path) -> None:
    """The check sees docstrings whose lines break within a phrase, and comments."""
    page = tmp_path / "page.py"
    page.write_text('"""A value lies\n   split."""\n# a bad file is refused\n', "utf-8")
    found = [p for p in RETIRED_PHRASES for t in texts_of(page) if re.search(p, t)]
    assert len(found) == 2
