"""Pipelines that are written as other tools write them: each error says how moecc has it."""

from __future__ import annotations

import pytest

from moecc.errors import UsageError
from moecc.pipeline.text import Pipeline

HINTS = {
    "upcycle(experts=8)": "options are in braces",
    "upcycle[experts=8]": "options are in braces",
    "upcycle experts=8": "options are in braces",
    "upcycle{experts=8,top-k=2}": "separated by blanks",
    "upcycle{experts=8, top-k=2}": "separated by blanks",
    "upcycle{experts = 8}": "joined by =",
    "upcycle{experts:8}": "joined by =",
    "upcycle{experts=8": "is written upcycle{experts=8 top-k=2}",
    "upcycle{experts=8} dce": "passes are separated by commas",
    "upcycle{top_k=2}": "did you mean 'top-k'?",
    "Upcycle": "did you mean 'upcycle'?",
}


@pytest.mark.parametrize("text", HINTS)
def test_a_hint_says_how_it_is_written(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Pipeline.parse(text)
    assert HINTS[text] in str(caught.value)
