"""Experts that are done part by part: the same results and gradients, and what cannot be cut."""

import numpy as np
import pytest

from moecc.ir import BF16, F32, F64, parse, print_graph
from moecc.testing import run_reference

jax = pytest.importorskip("jax")

from moecc_backends.xla.backend import function  # noqa: E402
from moecc_backends.xla.dispatch import blocks as expert_blocks  # noqa: E402
from moecc_backends.xla.dispatch import blocks as parts  # noqa: E402
from moecc_backends.xla.dispatch.blocks import ExpertParts, parts_of  # noqa: E402
from moecc_backends.xla.trace.context import Options  # noqa: E402

TOKENS, EMBED, MLP, EXPERTS = 700, 4, 12, 4
BLOCKS = Options("blocks", platform="cpu")

GATED = """
  %a = contract %rows, %gate {{over=embed}} : f32[{rows}, mlp=12]
  %b = add %a, %bias : f32[{rows}, mlp=12]
  %s = silu %b : f32[{rows}, mlp=12]
  %u = contract %rows, %up {{over=embed}} : f32[{rows}, mlp=12]
  %m = mul %s, %u : f32[{rows}, mlp=12]"""
"""A gated expert up to its last product, with a bias for each unit."""

NORMED = (
    GATED
    + """
  %n = rms_norm %m, %scale {{axis=mlp, eps=1e-5}} : f32[{rows}, mlp=12]"""
)


def layer(before=GATED, last="m", after="", out="o"):
    """A layer of experts; the first is wanted by nearly all, the second by none."""
    rows = f"group=1, expert={EXPERTS}, slot=ragged(%slots)"
    return parse(f"""moecc 1
graph layer {{
  input %x : f32[token={TOKENS}, embed={EMBED}]
  input %wanted : pred[token={TOKENS}]
  param %router : f32[expert=4, embed={EMBED}]
  param %gate : f32[expert=4, mlp={MLP}, embed={EMBED}]
  param %bias : f32[expert=4, mlp={MLP}]
  param %scale : f32[mlp={MLP}]
  param %up : f32[expert=4, mlp={MLP}, embed={EMBED}]
  param %down : f32[expert=4, embed={EMBED}, mlp={MLP}]
  param %late : f32[expert=4, embed={EMBED}]
  %logits = contract %x, %router {{over=embed}} : f32[token={TOKENS}, expert=4]
  %experts, %gates = route %logits {{top_k=2}} : i32[token={TOKENS}, choice=2], f32[token={TOKENS}, choice=2]
  %slots = assign_slots %experts, %wanted {{tokens=token, experts=4, slots=ragged, using=mask}} : i32[token={TOKENS}, choice=2]
  %rows = dispatch %x, %experts, %slots : f32[{rows}, embed={EMBED}]{before.format(rows=rows)}
  %o = contract %{last}, %down {{over=mlp}} : f32[{rows}, embed={EMBED}]{after.format(rows=rows)}
  %y = combine %{out}, %experts, %slots, %gates : f32[token={TOKENS}, embed={EMBED}]
  output y = %y
}}
""")  # noqa: E501


def draw(graph):
    rng = np.random.default_rng(0)
    params = {n: rng.standard_normal(v.type.shape) for n, v in graph.params.items()}
    params["router"] = np.array([[9.0] * 4, [-9.0] * 4, [1, -1, 1, -1], [-1, 1, -1, 1]])
    x = np.abs(rng.standard_normal((TOKENS, EMBED)))
    x[::5] = 1e30  # Tokens that are not wanted never reach a result.
    return params, {"x": x, "wanted": np.arange(TOKENS) % 5 > 0}


@pytest.fixture
def chosen(monkeypatch):
    """Let every matrix be too large, and tell how experts are cut."""
    found = []

    def told(*given):
        found.append(parts_of(*given))
        return found[-1]

    monkeypatch.setattr(parts, "MOST_BYTES", 150)
    monkeypatch.setattr(parts, "_LEAST_WIDTH", 1)
    monkeypatch.setattr(expert_blocks, "parts_of", told)
    return found


def test_parts_give_what_the_reference_gives(chosen):
    params, inputs = draw(layer())
    inputs["x"][::5] = 0
    expected = run_reference(layer(), params=params, inputs=inputs)["y"]
    with jax.enable_x64(True):
        found = jax.jit(function(layer(), dtype=F64, options=BLOCKS))(params, inputs)["y"]
    assert chosen[0].count == 3
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


LATE_BIAS = "\n  %late_o = add %o, %late : f32[{rows}, embed=4]"


@pytest.mark.parametrize(
    ("graph", "dtype"),
    [
        (layer(after=LATE_BIAS, out="late_o"), F64),
        (layer(NORMED, last="n"), F64),
        (layer(), BF16),
    ],
    ids=["a bias behind the last product", "a norm over what is cut", "sums that are rounded"],
)
def test_what_cannot_be_cut_is_done_whole(chosen, graph, dtype):
    params, inputs = draw(graph)
    inputs["x"][::5] = 0
    with jax.enable_x64(True):
        run = function(graph, dtype=dtype, options=BLOCKS)
        found = np.asarray(jax.jit(run)(params, inputs)["y"], np.float64)
    assert chosen == [ExpertParts()] * len(chosen)
    assert chosen
    if dtype is not BF16:
        expected = run_reference(graph, params=params, inputs=inputs)["y"]
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_a_compiled_program_copies_no_large_matrix_whole():
    text = print_graph(layer()).replace(f"mlp={MLP}", "mlp=2048")
    graph = parse(text.replace(f"embed={EMBED}", "embed=1024"))
    params = {n: jax.ShapeDtypeStruct(v.type.shape, np.float32) for n, v in graph.params.items()}
    inputs = {
        "x": jax.ShapeDtypeStruct((TOKENS, 1024), np.float32),
        "wanted": jax.ShapeDtypeStruct((TOKENS,), np.bool_),
    }
    compiled = jax.jit(function(graph, dtype=F32, options=BLOCKS)).lower(params, inputs).compile()
    assert "f32[512,1024]" in compiled.as_text()
    assert "f32[2048,1024]" not in compiled.as_text()
