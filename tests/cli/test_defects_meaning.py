"""Defects 22 and 26 to 29: depth, documentation, gradients and the types of routers."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from moecc_backends.xla.backend import XlaBackend
from moecc_passes.st_moe import ST_MOE

from moecc.ir import Graph, parse, print_graph
from moecc.rewrite.pipeline import Pipeline, installed
from moecc.rewrite.runner import run_pipeline
from moecc.testing import inputs_for, params_for, run_reference
from moecc.types import BF16

from .conftest import GOLDEN, Done

Moecc = Callable[..., Done]


# --- 22


def test_22_to_inspect_is_to_make_no_text_of_the_graph(
    moecc: Moecc, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text of 10,000 layers, made to see whether st_moe fits, took a third of the time."""
    from moecc.families.graphs import stored as graph_layout

    def forbidden(graph: Graph) -> str:
        raise AssertionError("the graph is printed")

    monkeypatch.setattr(graph_layout, "print_graph", forbidden)
    done = moecc("inspect", GOLDEN / "llama_gqa", "--format", "json")
    assert done.code == 0, done.err
    assert done.json()["targets"]["st_moe"]["fits"]


@pytest.mark.slow
def test_22_the_time_of_inspect_grows_as_the_layers_do(moecc: Moecc, tmp_path: Path) -> None:
    config = json.loads((GOLDEN / "llama_gqa" / "config.json").read_text())
    seconds = {}
    for layers in (3, 400, 1600):
        folder = tmp_path / str(layers)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
        start = time.process_time()
        assert moecc("inspect", folder).code == 0
        seconds[layers] = time.process_time() - start
    # Four times the layers.
    assert seconds[1600] - seconds[3] < 6 * (seconds[400] - seconds[3])
    assert seconds[1600] < 30


# --- 26


def deep() -> Graph:
    """Return a model with four layers."""
    from moecc.families import build
    from moecc.families.registry import parse_config
    from moecc.presets import preset_config

    small = {
        "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
        "num_key_value_heads": 2, "num_hidden_layers": 4, "vocab_size": 32,
    }  # fmt: skip
    return build(parse_config({**preset_config("smollm2-135m"), **small}))


def converted(graph: Graph, text: str) -> str:
    run_pipeline(graph, Pipeline.parse(text, installed()))
    del graph.attrs["routing"]
    return re.sub(r" by st-moe\S*", "", print_graph(graph))


def test_26_the_line_that_is_the_same_as_st_moe_is_the_same() -> None:
    doc = ST_MOE.doc.partition("the same as::")[2]
    upcycle, losses = (re.search(rf"{n}{{[^}}]*}}", doc)[0] for n in ("upcycle", "add-losses"))  # type: ignore[index]
    line = f"{' '.join(upcycle.split())},record-modes,{losses}".replace("experts=32", "experts=4")
    assert converted(deep(), "st-moe{experts=4}") == converted(deep(), line)


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
@pytest.mark.parametrize("over", ["group", "sequence", "global"])
def test_27_the_balance_loss_of_a_bf16_run_does_not_depend_on_the_types_of_the_graph(
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


def test_28_one_expert_a_token_is_warned_of(moecc: Moecc, tmp_path: Path) -> None:
    """The gate of the only choice is 1, whatever the router computes."""
    source = tmp_path / "dense.moe"
    assert moecc("import", GOLDEN / "llama_gqa", "-o", source).code == 0
    done = moecc("opt", source, "-p", "upcycle{experts=4 top-k=1}")
    assert done.code == 0
    assert "router gets no gradient" in done.err
    for gates in ("softmax", "switch"):
        done = moecc("opt", source, "-p", f"upcycle{{experts=4 top-k=1 gates={gates}}}")
        assert (done.code, "no gradient" in done.err) == (0, False), done.err


# --- 29


def test_29_a_router_in_the_type_of_the_run_can_be_had(
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


def test_29_a_router_has_the_type_of_the_run_or_float32(moecc: Moecc, tmp_path: Path) -> None:
    done = moecc("run", GOLDEN / "mixtral_gqa", "--outputs", tmp_path / "o.npy",
                 "--router-dtype", "bf16")  # fmt: skip
    assert done.code == 2
    assert "--router-dtype" in done.err
