"""The glossary: one word, one meaning, one module; names that were given up do not come back."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from .pages import ROOT

PACKAGES = ("moecc", "passes/moecc_passes", "backends/moecc_backends")
ROWS = re.findall(
    r"^\| (?!term|-)([^|]+) \| ([^|]+) \| `([\w.]+)` \| ([^|]+) \|$",
    (ROOT / "docs" / "glossary.md").read_text("utf-8"),
    re.MULTILINE,
)
RETIRED = {
    "Place", "place_of", "Packing", "RowPacking", "PlacedRows", "Dense", "RaggedRows", "Journey",
    "Hop", "Way", "Runs", "Spread", "put_off", "Wish", "Setting", "Settings", "Stated", "Guided",
    "Answer", "Prepared", "finished", "placed_anew", "placed_types", "misplaced", "placement_of",
    "unused_rows", "lower_moe", "lower_plain", "lower_routing", "chosen_rows", "collector",
    "quiet", "regions", "placing",
}  # fmt: skip
"""Identifiers and modules that have another name now ("place" as an English word is free)."""


SPELLED = {"local shard": "local_type", "location": "loc"}
"""Terms that the code of their module abbreviates."""


def source_of(module: str) -> Path:
    """Return the file of a module, by its dotted name."""
    package, *rest = module.split(".")
    folder = next(ROOT / p for p in PACKAGES if p.endswith(package))
    path = folder.joinpath(*rest)
    return path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"


def test_there_are_terms_in_order_each_once() -> None:
    terms = [term for term, *_ in ROWS]
    assert 40 <= len(terms) <= 60
    assert terms == sorted(set(terms), key=str.lower)


@pytest.mark.parametrize(("term", "module"), [(t, m) for t, _, m, _ in ROWS])
def test_the_module_speaks_of_its_term(term: str, module: str) -> None:
    text = source_of(module).read_text("utf-8").lower()
    words = re.findall(r"\w+", SPELLED.get(term, term).lower())
    assert [w for w in words if w.removesuffix("e") not in text] == []


def identifiers(tree: ast.AST) -> Iterator[str]:
    """Yield the names that a module defines, imports or reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg | ast.keyword) and node.arg is not None:
            yield node.arg
        elif isinstance(node, ast.alias):
            yield from node.name.split(".")


@pytest.mark.parametrize("package", PACKAGES)
def test_retired_names_do_not_come_back(package: str) -> None:
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / package).rglob("*.py")
        for name in {path.stem, *identifiers(ast.parse(path.read_text("utf-8")))} & RETIRED
    }
    assert found == set()


def test_no_operation_has_a_retired_name() -> None:
    from moecc.ir import OPS

    assert "place" not in OPS
    assert "assign_slots" in OPS


def test_a_retired_name_is_found() -> None:
    assert set(identifiers(ast.parse("def put_off(wish: Wish): x.finished"))) & RETIRED == {
        "put_off", "Wish", "finished",
    }  # fmt: skip
