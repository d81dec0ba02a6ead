"""Meaning: gradients, and the types of routers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from moecc_backends.xla.backend import XlaBackend
from tiers import few

from moecc.ir import Graph, parse
from moecc.rewrite.pipeline import Pipeline, installed
from moecc.rewrite.runner import run_pipeline
from moecc.testing import inputs_for, params_for, run_reference
from moecc.types import BF16

from .conftest import GOLDEN, Done

Moecc = Callable[..., Done]


# --- 22


# --- 26


# --- 27


def routed(kind: str, over: str) -> Graph:
    """Return a layer of routing whose counts are no powers of two: bf16 cannot hold f."""
    text = """moecc 1
graph g {
  input %x : f32[batch=3, seq=67, embed=8]
  param %w : f32[expert=4, embed=8]
  param %up : f32[expert=4, mlp=8, embed=8]
  param %down : f32[expert=4, embed=8, mlp=8]
  %l = contract %x, %w {over=embed, precision=f32} : f32[batch=3, seq=67, expert=4]
  %e, %g = route %l {top_k=2} : i32[batch=3, seq=67, choice=2], f32[batch=3, seq=67, choice=2]
  %p = assign_slots %e {tokens=(batch, seq), experts=4} : i32[batch=3, seq=67, choice=2]
  %d = dispatch %x, %e, %p : f32[group=1, expert=4, slot=ragged(%p), embed=8]
  %h = contract %d, %up {over=embed} : f32[group=1, expert=4, slot=ragged(%p), mlp=8]
  %o = contract %h, %down {over=mlp} : f32[group=1, expert=4, slot=ragged(%p), embed=8]
  %y = combine %o, %e, %p, %g : f32[batch=3, seq=67, embed=8]
  output logits = %y
}
"""
    graph = parse(text.replace("f32[", f"{kind}["))
    run_pipeline(graph, Pipeline.parse(f"add-losses{{over={over}}}", installed()))
    return graph


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("over", few(["group", "sequence", "global"]))
def test_the_balance_loss_of_a_bf16_run_does_not_depend_on_the_types_of_the_graph(
    kind: str, over: str
) -> None:
    graph = routed(kind, over)
    params = {n: a.astype(np.float32) for n, a in params_for(graph, 3).items()}
    inputs = {n: a.astype(np.float32) for n, a in inputs_for(graph, 3).items()}
    # What the run sees: parameters but the router's, and inputs, in bf16.
    narrow = {n: a.astype(BF16.numpy).astype(np.float64) for n, a in inputs.items()}
    wide = {n: a.astype(np.float64) for n, a in params.items()}
    expected = run_reference(graph, params=wide, inputs=narrow)["loss.balance"]
    found = XlaBackend().compile(graph, dtype=BF16).run(params, inputs)["loss.balance"]
    np.testing.assert_allclose(found, expected, rtol=2e-5)


# --- 28


# --- 29


def test_a_router_in_the_type_of_the_run_can_be_had(
    moecc: Moecc, dense: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "sparse"
    shutil.copytree(GOLDEN / "mixtral_gqa", folder)
    tokens = tmp_path / "t.npy"
    np.save(tokens, np.arange(64).reshape(1, 64) % 37)
    logits = {}
    for router in ("f32", "bf16"):
        done = moecc(
            "run", folder, "--inputs", tokens, "--outputs", tmp_path / f"{router}.npy",
            "--dtype", "bf16", "--router-dtype", router,
        )  # fmt: skip
        assert done.code == 0, done.err
        logits[router] = np.load(tmp_path / f"{router}.npy")
    default = moecc("run", folder, "--inputs", tokens, "--outputs", tmp_path / "d.npy",
                    "--dtype", "bf16")  # fmt: skip
    assert default.code == 0
    assert np.array_equal(np.load(tmp_path / "d.npy"), logits["f32"])
    assert not np.array_equal(logits["bf16"], logits["f32"])
    np.testing.assert_allclose(
        logits["bf16"], logits["f32"], atol=0.2 * np.abs(logits["f32"]).max()
    )
