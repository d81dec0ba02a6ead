"""Blocks that cover an expert's rows, and layers whose rows are never arrays of all rows."""

from __future__ import annotations

from functools import cache
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from tiers import examples, few

from moecc.ir import F64, Graph, parse, print_graph
from moecc.testing import run_reference
from moecc.types import DType

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from moecc_backends.xla.backend import function  # noqa: E402
from moecc_backends.xla.kernels.grouped_matmul import (  # noqa: E402
    cover_blocks,
    cover_sizes,
    overhang,
    walk_experts,
)
from moecc_backends.xla.trace.context import Options  # noqa: E402

SHAPES = ((5, 3), (100, 2), (900, 4), (2000, 4))
"""Rows and experts: fewer than the least block, one, and each step of sizes."""


@cache
def walked(num_rows: int, num_experts: int) -> Any:
    """Return a function of group sizes: who wrote each row last, and how many blocks there were."""
    sizes = cover_sizes(num_rows, num_experts)

    def run(group_sizes: Any) -> tuple[Any, Any]:
        starts = jnp.cumsum(group_sizes) - group_sizes

        def expert_body(expert: Any, carry: Any) -> Any:
            def step(first: Any, size: int, carry: Any) -> Any:
                owner, blocks = carry
                mine = jnp.full(size, expert, jnp.int32)
                return jax.lax.dynamic_update_slice(owner, mine, (first,)), blocks + 1

            return cover_blocks(starts[expert], group_sizes[expert], sizes, step, carry)

        owner = jnp.full(num_rows + overhang(sizes), -1, jnp.int32)
        return walk_experts(group_sizes, expert_body, (owner, 0))

    return jax.jit(run)


@settings(max_examples=examples(20, 100))
@given(st.data())
def test_every_row_is_written_last_by_its_expert_in_few_blocks(data: st.DataObject) -> None:
    num_rows, num_experts = data.draw(st.sampled_from(SHAPES))
    cuts = data.draw(st.lists(st.integers(0, num_rows), min_size=num_experts, max_size=num_experts))
    group_sizes = np.diff(sorted(cuts), prepend=0).astype(np.int32)
    owner, blocks = walked(num_rows, num_experts)(group_sizes)
    total = group_sizes.sum()
    np.testing.assert_array_equal(owner[:total], np.repeat(np.arange(num_experts), group_sizes))
    sizes = cover_sizes(num_rows, num_experts)
    whole = sizes[-2] if len(sizes) > 1 else sizes[-1]
    assert blocks <= sum(-(-int(n) // whole) for n in group_sizes)


def skewed(tokens: int) -> Graph:
    """A layer for `draw`, which masks every fifth token."""
    rows = "group=1, expert=4, slot=ragged(%slots)"
    return parse(f"""moecc 1
graph layer {{
  input %x : f32[token={tokens}, embed=4]
  input %wanted : pred[token={tokens}]
  param %router : f32[expert=4, embed=4]
  param %up : f32[expert=4, mlp=6, embed=4]
  param %bias : f32[expert=4, mlp=6]
  param %down : f32[expert=4, embed=4, mlp=6]
  %logits = contract %x, %router {{over=embed}} : f32[token={tokens}, expert=4]
  %experts, %gates = route %logits {{top_k=2}} : i32[token={tokens}, choice=2], f32[token={tokens}, choice=2]
  %slots = assign_slots %experts, %wanted {{tokens=token, experts=4, slots=ragged, using=mask}} : i32[token={tokens}, choice=2]
  %rows = dispatch %x, %experts, %slots : f32[{rows}, embed=4]
  %u = contract %rows, %up {{over=embed}} : f32[{rows}, mlp=6]
  %biased = add %u, %bias : f32[{rows}, mlp=6]
  %m = silu %biased : f32[{rows}, mlp=6]
  %o = contract %m, %down {{over=mlp}} : f32[{rows}, embed=4]
  %y = combine %o, %experts, %slots, %gates : f32[token={tokens}, embed=4]
  output y = %y
}}
""")  # noqa: E501


def draw(graph: Graph, tokens: int) -> tuple[dict[str, Any], dict[str, Any]]:
    rng = np.random.default_rng(0)
    params = {n: rng.standard_normal(v.type.shape) for n, v in graph.params.items()}
    x = np.abs(rng.standard_normal((tokens, 4)))
    # The first expert is wanted by nearly all, the second by none.
    params["router"] = np.array([[9.0] * 4, [-9.0] * 4, [1, -1, 1, -1], [-1, 1, -1, 1]])
    return params, {"x": x, "wanted": np.arange(tokens) % 5 > 0}


@pytest.mark.parametrize("dispatch", ["blocks", "auto"])
def test_a_layer_of_many_rows_is_the_reference(dispatch: str) -> None:
    graph = skewed(700)
    params, inputs = draw(graph, 700)
    expected = run_reference(graph, params=params, inputs=inputs)["y"]
    with jax.enable_x64(True):
        run = jax.jit(function(graph, dtype=F64, options=Options(dispatch, platform="cpu")))
        found = run(params, inputs)["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def slopes(dispatch: str, dtype: DType, remat: bool = False) -> tuple[Any, Any]:
    """The gradients of half the square of the results, in parameters and tokens."""
    graph = skewed(700)
    params, inputs = draw(graph, 700)
    run = function(graph, dtype=dtype, options=Options(dispatch, platform="cpu"))
    layer = jax.checkpoint(run) if remat else run

    def loss(params: Any, x: Any) -> Any:
        return jnp.sum(jnp.square(layer(params, {**inputs, "x": x})["y"])) / 2

    found: tuple[Any, Any] = jax.jit(jax.grad(loss, (0, 1)))(params, inputs["x"])
    return found


@pytest.mark.parametrize("remat", few([True, False]))
def test_gradients_of_many_rows_are_those_of_all_rows_at_once(remat: bool) -> None:
    with jax.enable_x64(True):
        expected, found = slopes("grouped", F64), slopes("blocks", F64, remat)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-9, atol=1e-9)


def test_no_array_of_all_rows_is_made_but_their_results() -> None:
    tokens, mlp = 4096, 512
    text = print_graph(skewed(tokens)).replace("mlp=6", f"mlp={mlp}")
    graph = parse(text)
    shapes = {n: jax.ShapeDtypeStruct(v.type.shape, np.float32) for n, v in graph.params.items()}
    inputs = {
        "x": jax.ShapeDtypeStruct((tokens, 4), np.float32),
        "wanted": jax.ShapeDtypeStruct((tokens,), np.bool_),
    }

    def temporaries(dispatch: str) -> int:
        run = function(graph, options=Options(dispatch, platform="cpu"))
        compiled = jax.jit(run).lower(shapes, inputs).compile()
        return int(compiled.memory_analysis().temp_size_in_bytes)

    hidden = 2 * tokens * mlp * 4
    assert temporaries("grouped") > hidden
    assert temporaries("blocks") < hidden / 2
    assert temporaries("auto") == temporaries("blocks")
