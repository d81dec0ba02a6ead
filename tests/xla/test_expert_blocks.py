"""Experts in blocks of rows and in parts of matrices: the same results, in less memory."""

from functools import cache

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from moecc_backends.xla.backend import function
from moecc_backends.xla.dispatch import blocks as expert_blocks
from moecc_backends.xla.dispatch.blocks import ExpertParts, parts_of
from moecc_backends.xla.kernels.grouped_matmul import (
    cover_blocks,
    cover_sizes,
    overhang,
    walk_experts,
)
from moecc_backends.xla.trace.context import Options
from tiers import examples

from moecc.ir import BF16, F32, F64, parse
from moecc.testing import run_reference

from .models import normal, values_and_gradients

# --- blocks that cover an expert's rows

SHAPES = ((5, 3), (100, 2), (900, 4), (2000, 4))
"""Rows and experts: fewer than the least block, one, and each step of sizes."""


@cache
def walked(num_rows, num_experts):
    """Return a function of group sizes: who wrote each row last, and how many blocks there were."""
    sizes = cover_sizes(num_rows, num_experts)

    def run(group_sizes):
        starts = jnp.cumsum(group_sizes) - group_sizes

        def expert_body(expert, carry):
            def step(first, size, carry):
                owner, blocks = carry
                mine = jnp.full(size, expert, jnp.int32)
                return jax.lax.dynamic_update_slice(owner, mine, (first,)), blocks + 1

            return cover_blocks(starts[expert], group_sizes[expert], sizes, step, carry)

        owner = jnp.full(num_rows + overhang(sizes), -1, jnp.int32)
        return walk_experts(group_sizes, expert_body, (owner, 0))

    return jax.jit(run)


@settings(max_examples=examples(20, 100))
@given(st.data())
def test_every_row_is_written_last_by_its_expert_in_few_blocks(data):
    num_rows, num_experts = data.draw(st.sampled_from(SHAPES))
    cuts = data.draw(st.lists(st.integers(0, num_rows), min_size=num_experts, max_size=num_experts))
    group_sizes = np.diff(sorted(cuts), prepend=0).astype(np.int32)
    owner, blocks = walked(num_rows, num_experts)(group_sizes)
    total = group_sizes.sum()
    np.testing.assert_array_equal(owner[:total], np.repeat(np.arange(num_experts), group_sizes))
    sizes = cover_sizes(num_rows, num_experts)
    whole = sizes[-2] if len(sizes) > 1 else sizes[-1]
    assert blocks <= sum(-(-int(n) // whole) for n in group_sizes)


# --- layers whose rows are never arrays of all rows

GATED = """
  %a = contract %rows, %gate {{over=embed}} : f32[{rows}, mlp={mlp}]
  %b = add %a, %bias : f32[{rows}, mlp={mlp}]
  %s = silu %b : f32[{rows}, mlp={mlp}]
  %u = contract %rows, %up {{over=embed}} : f32[{rows}, mlp={mlp}]
  %m = mul %s, %u : f32[{rows}, mlp={mlp}]"""
"""A gated expert up to its last product, with a bias for each unit."""

NORMED = (
    GATED
    + """
  %n = rms_norm %m, %scale {{axis=mlp, eps=1e-5}} : f32[{rows}, mlp={mlp}]"""
)


def layer(before=GATED, last="m", after="", out="o", *, tokens=700, embed=4, mlp=12):
    """A layer of experts; the first is wanted by nearly all, the second by none."""
    rows = "group=1, expert=4, slot=ragged(%slots)"
    return parse(f"""moecc 1
graph layer {{
  input %x : f32[token={tokens}, embed={embed}]
  input %wanted : pred[token={tokens}]
  param %router : f32[expert=4, embed={embed}]
  param %gate : f32[expert=4, mlp={mlp}, embed={embed}]
  param %bias : f32[expert=4, mlp={mlp}]
  param %scale : f32[mlp={mlp}]
  param %up : f32[expert=4, mlp={mlp}, embed={embed}]
  param %down : f32[expert=4, embed={embed}, mlp={mlp}]
  param %late : f32[expert=4, embed={embed}]
  %logits = contract %x, %router {{over=embed}} : f32[token={tokens}, expert=4]
  %experts, %gates = route %logits {{top_k=2}} : i32[token={tokens}, choice=2], f32[token={tokens}, choice=2]
  %slots = assign_slots %experts, %wanted {{tokens=token, experts=4, slots=ragged, using=mask}} : i32[token={tokens}, choice=2]
  %rows = dispatch %x, %experts, %slots : f32[{rows}, embed={embed}]{before.format(rows=rows, mlp=mlp)}
  %o = contract %{last}, %down {{over=mlp}} : f32[{rows}, embed={embed}]{after.format(rows=rows)}
  %y = combine %{out}, %experts, %slots, %gates : f32[token={tokens}, embed={embed}]
  output y = %y
}}
""")  # noqa: E501


def on_cpu(graph, dispatch, dtype=F64):
    return function(graph, dtype=dtype, options=Options(dispatch, platform="cpu"))


def draw(graph):
    rng = np.random.default_rng(0)
    params = normal(rng, graph.params)
    params["router"] = np.array([[9.0] * 4, [-9.0] * 4, [1, -1, 1, -1], [-1, 1, -1, 1]])
    (tokens, _) = shape = graph.inputs["x"].type.shape
    x = np.abs(rng.normal(size=shape))
    x[::5] = 0
    return params, {"x": x, "wanted": np.arange(tokens) % 5 > 0}


def assert_is_the_reference(graph, dispatch):
    params, inputs = draw(graph)
    expected = run_reference(graph, params=params, inputs=inputs)["y"]
    with jax.enable_x64(True):
        found = jax.jit(on_cpu(graph, dispatch))(params, inputs)["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dispatch", ["blocks", "auto"])
def test_a_layer_of_many_rows_is_the_reference(dispatch):
    assert_is_the_reference(layer(), dispatch)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [True, False])
def test_gradients_of_many_rows_are_those_of_all_rows_at_once(remat):
    graph = layer()
    at_once, in_blocks = (on_cpu(graph, dispatch) for dispatch in ("grouped", "blocks"))
    if remat:
        in_blocks = jax.checkpoint(in_blocks)
    with jax.enable_x64(True):
        (_, expected, _), (_, found, _) = (
            values_and_gradients(run, *draw(graph), lambda out: jnp.sum(jnp.square(out["y"])) / 2)
            for run in (at_once, in_blocks)
        )
    for name, slope in expected.items():
        np.testing.assert_allclose(found[name], slope, rtol=1e-9, atol=1e-9, err_msg=name)


def compiled(graph, dispatch):
    shapes = (
        {n: jax.ShapeDtypeStruct(v.type.shape, v.type.dtype.numpy) for n, v in values.items()}
        for values in (graph.params, graph.inputs)
    )
    return jax.jit(on_cpu(graph, dispatch, F32)).lower(*shapes).compile()


def test_no_array_of_all_rows_is_made_but_their_results():
    graph = layer(tokens=4096, mlp=512)
    temporaries = {
        dispatch: compiled(graph, dispatch).memory_analysis().temp_size_in_bytes
        for dispatch in ("grouped", "blocks", "auto")
    }
    hidden = 2 * 4096 * 512 * 4
    assert temporaries["grouped"] > hidden
    assert temporaries["blocks"] < hidden / 2
    assert temporaries["auto"] == temporaries["blocks"]


# --- experts that are done part by part


@pytest.fixture
def chosen(monkeypatch):
    """Let every matrix be too large, and tell how experts are cut."""
    parts = []

    def told(*operands):
        parts.append(parts_of(*operands))
        return parts[-1]

    monkeypatch.setattr(expert_blocks, "MOST_BYTES", 150)
    monkeypatch.setattr(expert_blocks, "_LEAST_WIDTH", 1)
    monkeypatch.setattr(expert_blocks, "parts_of", told)
    return parts


def test_parts_give_what_the_reference_gives(chosen):
    assert_is_the_reference(layer(), "blocks")
    assert chosen[0].count == 3


LATE_BIAS = "\n  %late_o = add %o, %late : f32[{rows}, embed=4]"


@pytest.mark.parametrize(
    "graph",
    [layer(after=LATE_BIAS, out="late_o"), layer(NORMED, last="n")],
    ids=["a bias behind the last product", "a norm over what is cut"],
)
def test_what_cannot_be_cut_is_done_whole(chosen, graph):
    assert_is_the_reference(graph, "blocks")
    assert set(chosen) == {ExpertParts()}


def test_sums_that_are_rounded_are_not_cut(chosen):
    jax.jit(on_cpu(layer(), "blocks", BF16))(*draw(layer()))
    assert set(chosen) == {ExpertParts()}


def test_a_compiled_program_copies_no_large_matrix_whole():
    program = compiled(layer(embed=1024, mlp=2048), "blocks").as_text()
    assert "f32[512,1024]" in program
    assert "f32[2048,1024]" not in program
