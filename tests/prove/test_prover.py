"""Proofs of whole graphs: golden checkpoints before and after passes."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

import moecc
from moecc.prove import prove

GOLDEN = Path(__file__).parents[1] / "golden"


@cache
def model(name: str) -> moecc.Model:
    return moecc.open(str(GOLDEN / name))


@pytest.mark.parametrize("pipeline", ["upcycle{experts=8 top-k=2}", "cse", "canonicalize", "dce"])
def test_the_same_function_is_proved(pipeline: str) -> None:
    dense = model("llama_gqa")
    verdict = prove(dense.graph, dense.apply(pipeline).graph)
    assert verdict.status == "proved", (verdict.node, verdict.terms)


def test_slots_and_shares_prove_an_upcycled_model() -> None:
    dense = model("llama_gqa")
    lemmas = prove(dense.graph, dense.apply("upcycle{experts=8 top-k=2}").graph).lemmas
    assert lemmas["slot of a choice"] > 0
    assert lemmas["shares add up"] > 0


def test_other_experts_are_refuted_at_their_combination() -> None:
    dense = model("llama_gqa")
    noisy = dense.apply("upcycle{experts=8 top-k=2 init=noise noise-std=0.1}")
    verdict = prove(dense.graph, noisy.graph)
    assert verdict.status == "refuted"
    assert "combine @layers.0.ffn" in verdict.node
    assert verdict.counterexample is not None
    assert verdict.counterexample.output == "logits"
