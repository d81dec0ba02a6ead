"""``moecc lower``: the texts of a lowering, and what it refuses."""

import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest

from moecc.ir import print_graph
from moecc.ir.operation import OPS

from .conftest import UPCYCLE

pytest.importorskip("jax")

GRAPH = """moecc 1
graph layer {
  input %x : f32[token=T, embed=8]
  param %router : f32[expert=4, embed=8]
  param %up : f32[expert=4, mlp=16, embed=8]
  param %down : f32[expert=4, embed=8, mlp=16]
  %logits = contract %x, %router {over=embed} : f32[token=T, expert=4]
  %experts, %gates = route %logits {top_k=2} : i32[token=T, choice=2], f32[token=T, choice=2]
  %slots = assign_slots %experts {tokens=token, experts=4} : i32[token=T, choice=2]
  %rows = dispatch %x, %experts, %slots : f32[group=1, expert=4, slot=ragged(%slots), embed=8]
  %a = contract %rows, %up {over=embed} : f32[group=1, expert=4, slot=ragged(%slots), mlp=16]
  %s = silu %a : f32[group=1, expert=4, slot=ragged(%slots), mlp=16]
  %o = contract %s, %down {over=mlp} : f32[group=1, expert=4, slot=ragged(%slots), embed=8]
  %y = combine %o, %experts, %slots, %gates : f32[token=T, embed=8]
  output y = %y
}
"""


@pytest.fixture
def lower(cli, tmp_path):
    """Lower a sparse layer without a capacity."""
    path = tmp_path / "layer.moe"
    path.write_text(GRAPH)
    return partial(cli, "lower", path)


@pytest.mark.parametrize(
    ("emit", "says"), [("jaxpr", "lambda"), ("stablehlo", "module @"), ("hlo", "HloModule")]
)
def test_every_text(lower, emit, says):
    done = lower("--emit", emit, "--seq", "32")
    assert says in done.out
    assert done.err == ""


@pytest.mark.parametrize(
    ("emit", "place"),
    [("stablehlo", 'loc("jit(run)/layers.1.ffn/'), ("hlo", 'op_name="jit(run)/layers.1.ffn/')],
)
def test_operations_name_their_place(cli, dense_graph, emit, place):
    text = cli("lower", dense_graph, "--emit", emit, "--seq", "4").out
    assert text.count(f"{place}dot_general") >= 3
    assert emit == "hlo" or ".py" not in text


def test_a_mesh_is_not_lowered_and_said_so(cli, tmp_path):
    path = tmp_path / "mesh.moe"
    rows = GRAPH.replace("token=", "token@data=").replace("{tokens@data=", "{tokens=")
    text = f"{rows[: rows.index('  %logits')]}  output y = %x\n}}\n"
    path.write_text(text.replace("layer {", 'layer {\n  attr mesh = {"data": 2}'))
    cli("lower", path, says="without the mesh data:2; moecc compile")


def test_the_platform_and_the_dispatch_show(lower):
    """On a TPU sorted rows meet ragged_dot, on a CPU a loop over blocks."""
    on_tpu = lower("--platform", "tpu", "--seq", "32").out
    on_cpu = lower("--platform", "cpu", "--seq", "32").out
    assert "ragged_dot" in on_tpu
    assert "stablehlo.while" in on_cpu
    assert "ragged_dot" not in on_cpu
    dense = lower("--emit", "jaxpr", "--dispatch", "used", "--seq", "32").out
    assert dense.count("cond[") == 4  # one for each expert


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--emit", "stablehlp"], 2, "did you mean 'stablehlo'?"),
        (["--batch", "0"], 2, "--batch"),
        (["--emit", "hlo", "--platform", "tpu"], 4, "--emit stablehlo"),
        (["--dispatch", "gather"], 1, "sets no capacity"),
        (["--dispatch", "gather"], 1, "auto, grouped, blocks, ragged_dot, gathered"),
        (["--weights", "nowhere"], 1, "nowhere"),
    ],
)
def test_refusals(lower, options, code, says):
    assert lower(*options, code=code, says=says).out == ""


def test_without_jax_it_says_what_to_install(lower, monkeypatch):
    # What is None there cannot be imported.
    monkeypatch.setitem(sys.modules, "jax", None)
    assert lower(code=4, says="pip install 'jax<").out == ""


@patch.dict(OPS)
def test_an_operation_from_outside_is_passed_over_and_lowered(tmp_path, monkeypatch, cli):
    page = (Path(__file__).parents[2] / "docs" / "ir.md").read_text("utf-8")
    code = page[page.index("## An operation of your own") :].split("```python\n")[1].split("```")[0]
    (tmp_path / "mish.py").write_text(code[: code.index("graph = Graph")])
    names = {}
    exec(code, names)
    (tmp_path / "dense.moe").write_text(print_graph(names["graph"]))
    del OPS["mish"], OPS["lerp"]
    monkeypatch.chdir(tmp_path)

    load = ("--load", "mish.py")
    cli("opt", "dense.moe", "-p", UPCYCLE, "--check", "-o", "sparse.moe", *load)
    assert "= mish " in (tmp_path / "sparse.moe").read_text()
    del OPS["mish"], OPS["lerp"]
    copy = (tmp_path / "mish.py").rename(tmp_path / "again.py")  # a file runs once in a process
    assert "proved" in cli("prove", "dense.moe", "dense.moe", "--load", copy).out
    load = ("--load", copy)
    assert "logaddexp" in cli("lower", "sparse.moe", "--emit", "jaxpr", *load).out
    del OPS["mish"], OPS["lerp"]
    unknown = cli("opt", "sparse.moe", code=1).err
    assert "unknown operation 'mish'" in unknown
    assert "if it is your own: --load FILE" in unknown
