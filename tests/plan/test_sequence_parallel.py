"""Sequences sharded between products, rows in chunks: what a plan prices is what is compiled."""

from pathlib import Path

import pytest

import moecc

GOLDEN = Path(__file__).parents[1] / "golden"
LLAMA = str(GOLDEN / "llama_gqa")
TENSOR = "data-parallel,tensor-parallel"
RULES = f"{TENSOR},sequence-parallel"


def best(rules, remat):
    given = {"batch_tokens": 2048, "sequence": "64", "dtype": "f32"}
    model = moecc.open(LLAMA)
    plan = model.plan("cpu:8", mesh="data=4,model=2", rules=rules, remat=remat, **given)
    return dict(plan.best)


def sent(plan):
    return sum(float(row["sent_bytes"]) for row in plan["collectives"].values())


@pytest.mark.parametrize("remat", ["none", "save"])
def test_the_bytes_are_those_of_sums_and_less_is_kept(remat):
    """A gather and a scatter send what an all-reduce does; what is between them is in parts."""
    whole, parts = best(TENSOR, remat), best(RULES, remat)
    assert parts["memory_bytes"]["activations"] < whole["memory_bytes"]["activations"]
    if remat == "none":
        # Norms of parts of sequences sum their gradients over model too, and that is all.
        assert sent(parts) == pytest.approx(sent(whole), rel=0.02)
    before, after = (p["collectives"]["all_reduce"]["tensor_bytes"] for p in (whole, parts))
    assert after < before / 5
