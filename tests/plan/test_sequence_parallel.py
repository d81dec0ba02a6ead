"""Sequences sharded between products, rows in chunks: what a plan prices is what is compiled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import moecc
from moecc.cli.main import main
from tests.support.rotary_tables import table_flops

GOLDEN = Path(__file__).parents[1] / "golden"
LLAMA = str(GOLDEN / "llama_gqa")
TENSOR = "data-parallel,tensor-parallel"
RULES = f"{TENSOR},sequence-parallel"
STEP = ("--machine", "cpu:8", "--mesh", "data=4,model=2", "--batch-tokens", "2048")


def best(rules: str, remat: str) -> dict[str, Any]:
    given: dict[str, Any] = {"batch_tokens": 2048, "sequence": "64", "dtype": "f32"}
    model = moecc.open(LLAMA)
    plan = model.plan("cpu:8", mesh="data=4,model=2", rules=rules, remat=remat, **given)
    return dict(plan.best)


def sent(plan: dict[str, Any]) -> float:
    return sum(float(row["sent_bytes"]) for row in plan["collectives"].values())


@pytest.mark.parametrize("remat", ["none", "save"])
def test_the_bytes_are_those_of_sums_and_less_is_kept(remat: str) -> None:
    """A gather and a scatter send what an all-reduce does; what is between them is in parts."""
    whole, parts = best(TENSOR, remat), best(RULES, remat)
    assert parts["memory_bytes"]["activations"] < whole["memory_bytes"]["activations"]
    if remat == "none":
        # Norms of parts of sequences sum their gradients over model too, and that is all.
        assert sent(parts) == pytest.approx(sent(whole), rel=0.02)
    before, after = (p["collectives"]["all_reduce"]["tensor_bytes"] for p in (whole, parts))
    assert after < before / 5


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_what_is_compiled_has_the_planned_products_gathers_and_scatters(
    capsys: pytest.CaptureFixture[str], remat: str
) -> None:
    pytest.importorskip("optax")
    args = [*STEP, "--rules", RULES, "--dtype", "f32", "--sequence", "64", "--remat", remat]
    assert main(["compile", LLAMA, *args, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    # A device has half of the 64 positions; heads are 4 wide.
    assert found["flops"] == found["predicted"]["flops"] + table_flops(32, 4)
    compiled, planned = found["collectives"], found["predicted"]["collectives"]
    for op in ("all-gather", "reduce-scatter"):
        assert compiled[op]["runs"] == planned[op]["count"]
        assert compiled[op]["bytes"] == planned[op]["bytes"]
    total = [sum(row["bytes"] for row in each.values()) for each in (compiled, planned)]
    assert total[1] == pytest.approx(total[0], rel=0.05)


MIXTRAL = str(GOLDEN / "mixtral_gqa")
CHUNKED = ("--via", "capacity", "--machine", "cpu:4", "--mesh", "expert=4", "--sequence", "16")


@pytest.mark.slow
def test_chunks_send_what_is_sent_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optax")
    found = {}
    for chunks in ("1", "2"):
        args = [*CHUNKED, "--batch-tokens", "256", "--dtype", "f32", "--chunks", chunks]
        assert main(["compile", MIXTRAL, *args, "--format", "json"]) == 0
        found[chunks] = json.loads(capsys.readouterr().out)
    whole, cut = (found[n]["collectives"]["all-to-all"] for n in ("1", "2"))
    planned = found["2"]["predicted"]
    assert cut["runs"] == 2 * whole["runs"]
    assert cut["bytes"] == whole["bytes"] == planned["collectives"]["all-to-all"]["bytes"]
    assert found["2"]["flops"] == planned["flops"] + table_flops(16, 4)
    assert planned["seconds"] < found["1"]["predicted"]["seconds"]
