"""``docs/formats.md`` names the manifest's keys, the expressions, storage types and families."""

from __future__ import annotations

import re
from dataclasses import fields

from moecc.checkpoint.gguf.families import GGUF_FAMILIES, GGUF_MIXTURES
from moecc.checkpoint.gguf.shapes import SHAPES
from moecc.checkpoint.gguf.storage import BY_NAME
from moecc.checkpoint.gguf.tokenizer import PRE_TOKENIZERS
from moecc.checkpoint.quantised.folder import METHODS
from moecc.checkpoint.records import (
    SCHEMA,
    FileRecord,
    Manifest,
    TensorRecord,
    WeightFileRecord,
    library_versions,
)
from moecc.checkpoint.trees.maxtext import FAMILIES
from moecc.families.configs import CONFIGS
from moecc.families.configs.rope import SCALING_PARAMETERS
from moecc.tasks.convert import MAX_SHARD_BYTES
from moecc.types.dtypes import DTYPES
from moecc.weights.textparse import _PARSERS

from .pages import ROOT, blocks

PAGE = (ROOT / "docs" / "formats.md").read_text("utf-8")
_CODE = re.compile(r"`([^`]+)`")


def section(heading: str) -> str:
    match = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", PAGE, re.M | re.S)
    assert match is not None
    return match.group(1)


def first_cells(text: str) -> list[str]:
    rows = re.findall(r"^\| (\[?`.*?) \|", text, re.M)
    return [code for cell in rows for code in _CODE.findall(cell)]


def test_the_manifest() -> None:
    text = section("moecc_manifest.json")
    assert set(first_cells(text)) == {f.name for f in fields(Manifest)} | {"seal"}
    assert f"| `schema` | {SCHEMA} |" in text
    for record in (FileRecord, WeightFileRecord, TensorRecord):
        assert {f.name for f in fields(record)} <= set(_CODE.findall(text))
    assert set(library_versions()) <= set(_CODE.findall(text))


def test_the_weight_expressions() -> None:
    listed = [code.split("(")[0] for code in first_cells(section("Weight expressions"))]
    assert set(listed) == set(_PARSERS)
    examples = "\n".join(b.text for b in blocks("moe weights"))
    assert [name for name in _PARSERS if f"{name}(" not in examples] == []


def test_the_families() -> None:
    assert set(first_cells(section("Families"))) >= set(CONFIGS)
    scalings = re.search(r"Scalings of the rotary frequencies: ([^.]*)\.", PAGE)
    assert scalings is not None
    assert _CODE.findall(scalings.group(1)) == list(SCALING_PARAMETERS)


def test_what_is_read_of_gguf() -> None:
    text = section("A GGUF file, read")
    storages = re.search(r"\*\*Storage types\*\*: ([^.]*)\.", text)
    assert storages is not None
    assert storages.group(1).split(", ") == list(BY_NAME)
    named = set(_CODE.findall(text))
    assert {*PRE_TOKENIZERS, *GGUF_FAMILIES, *GGUF_MIXTURES, *SHAPES} <= named


def test_what_is_read_of_quantised_folders() -> None:
    text = section("Quantised weights")
    assert set(METHODS) <= set(_CODE.findall(text))


def test_what_is_read_of_maxtext() -> None:
    text = section("Checkpoints of JAX programs")
    assert set(FAMILIES) <= set(_CODE.findall(text))


def test_the_limit_of_a_shard() -> None:
    assert f"{MAX_SHARD_BYTES:.0e}" == "5e+09"
    assert "`--max-shard-bytes` (5·10⁹)" in PAGE


def test_the_element_types_of_the_grammar() -> None:
    page = (ROOT / "docs" / "ir.md").read_text("utf-8")
    listed = re.search(r"^dtype +=(.*)$", page, re.M)
    assert listed is not None
    assert listed.group(1).split() == list(DTYPES)
