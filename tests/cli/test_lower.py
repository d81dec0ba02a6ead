"""``moecc lower``: the texts of a lowering, and what it refuses."""

import sys
from pathlib import Path

import pytest

from moecc.ir import print_graph
from moecc.ir.operation import OPS

pytest.importorskip("jax")

ROWS = "group=1, expert=4, slot={slots}(%slots)"
GRAPH = """moecc 1
graph layer {{
  input %x : f32[token=T, embed=8]
  param %router : f32[expert=4, embed=8]
  param %up : f32[expert=4, mlp=16, embed=8]
  param %down : f32[expert=4, embed=8, mlp=16]
  %logits = contract %x, %router {{over=embed}} : f32[token=T, expert=4]
  %experts, %gates = route %logits {{top_k=2}} : i32[token=T, choice=2], f32[token=T, choice=2]
  %slots = assign_slots %experts {{tokens=token, experts=4{place}}} : i32[token=T, choice=2]
  %rows = dispatch %x, %experts, %slots : f32[{rows}, embed=8]
  %a = contract %rows, %up {{over=embed}} : f32[{rows}, mlp=16]
  %s = silu %a : f32[{rows}, mlp=16]
  %o = contract %s, %down {{over=mlp}} : f32[{rows}, embed=8]
  %y = combine %o, %experts, %slots, %gates : f32[token=T, embed=8]
  output y = %y
}}
"""


@pytest.fixture
def layer(tmp_path):
    """Write a sparse layer, dropless or with a capacity, and return its path."""

    def write(slots="ragged"):
        place = "" if slots == "ragged" else ", slots=capacity, capacity_factor=1.25"
        path = tmp_path / f"{slots}.moe"
        path.write_text(GRAPH.format(place=place, rows=ROWS.format(slots=slots)))
        return path

    return write


@pytest.mark.parametrize(
    ("emit", "says"), [("jaxpr", "lambda"), ("stablehlo", "module @"), ("hlo", "HloModule")]
)
def test_every_text(moecc, layer, emit, says):
    done = moecc("lower", layer(), "--emit", emit, "--seq", "32")
    assert done.code == 0, done.err
    assert says in done.out
    assert done.err == ""


def test_the_platform_and_the_dispatch_show(moecc, layer):
    """On a TPU sorted rows meet ragged_dot, on a CPU a loop over blocks."""
    on_tpu = moecc("lower", layer(), "--platform", "tpu", "--seq", "32").out
    on_cpu = moecc("lower", layer(), "--platform", "cpu", "--seq", "32").out
    assert "ragged_dot" in on_tpu
    assert "stablehlo.while" in on_cpu
    assert "ragged_dot" not in on_cpu
    dense = moecc("lower", layer(), "--emit", "jaxpr", "--dispatch", "used", "--seq", "32").out
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
def test_refusals(moecc, layer, options, code, says):
    done = moecc("lower", layer(), *options)
    assert (done.code, done.out) == (code, "")
    assert says in done.err


def test_without_jax_it_says_what_to_install(moecc, layer, monkeypatch):
    path = layer()
    # What is None there cannot be imported.
    monkeypatch.setitem(sys.modules, "jax", None)
    done = moecc("lower", path)
    assert (done.code, done.out) == (4, "")
    assert "pip install 'jax<" in done.err


@pytest.fixture
def table():
    """The table of operations, which loses those that a test adds."""
    earlier = set(OPS)
    yield OPS
    for name in OPS.keys() - earlier:
        del OPS[name]


def test_an_operation_from_outside_is_passed_over_and_lowered(tmp_path, monkeypatch, moecc, table):
    page = (Path(__file__).parents[2] / "docs" / "ir.md").read_text("utf-8")
    code = page[page.index("## An operation of your own") :].split("```python\n")[1].split("```")[0]
    (tmp_path / "mish.py").write_text(code[: code.index("graph = Graph")])
    names = {}
    exec(code, names)
    (tmp_path / "dense.moe").write_text(print_graph(names["graph"]))
    del table["mish"]
    monkeypatch.chdir(tmp_path)

    def run(*words):
        done = moecc(*words, "--load", "mish.py")
        assert done.code == 0, done.err
        return done.out

    sparse = run("opt", "dense.moe", "-p", "upcycle{experts=4 top-k=2}", "--check")
    assert "= mish " in sparse
    (tmp_path / "sparse.moe").write_text(sparse)
    assert "logaddexp" in run("lower", "sparse.moe", "--emit", "jaxpr")
