"""``docs/lowering.md`` lists the dispatch lowerings and the names that a gradient may keep."""

from __future__ import annotations

import re
from pathlib import Path

from moecc.ir.remat_names import KEPT

PAGE = Path(__file__).parents[2].joinpath("docs", "lowering.md").read_text("utf-8")


def _section(heading: str) -> str:
    return PAGE.partition(f"## {heading}\n")[2].partition("\n##")[0]


def _names(heading: str) -> list[str]:
    return re.findall(r"^\| `(\w+)` \|", _section(heading), re.MULTILINE)


def test_the_names_that_a_gradient_keeps() -> None:
    assert _names("What a gradient keeps") == list(KEPT)


def test_the_dispatch_lowerings_and_what_is_legal() -> None:
    import pytest

    pytest.importorskip("jax")
    from moecc_backends.xla.dispatch.choose import TABLE

    assert _names("Dispatch lowerings") == list(TABLE)
    for name, way in TABLE.items():
        table = _section("Dispatch lowerings")
        (row,) = re.findall(rf"^\| `{name}` \|.*", table, re.MULTILINE)
        assert ("under a capacity" in row) == way.in_slots
