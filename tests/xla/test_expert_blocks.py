"""Blocks that cover an expert's rows, and layers whose rows are never arrays of all rows."""

from functools import cache

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from tiers import examples

from moecc.ir import F64, parse, print_graph
from moecc.testing import run_reference

from .test_parts import draw, layer

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


@pytest.mark.parametrize("dispatch", ["blocks", "auto"])
def test_a_layer_of_many_rows_is_the_reference(dispatch):
    graph = layer()
    params, inputs = draw(graph)
    inputs["x"][::5] = 0
    expected = run_reference(graph, params=params, inputs=inputs)["y"]
    with jax.enable_x64(True):
        run = jax.jit(function(graph, dtype=F64, options=Options(dispatch, platform="cpu")))
        found = run(params, inputs)["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def slopes(dispatch, dtype, remat=False):
    """The gradients of half the square of the results, in parameters and tokens."""
    graph = layer()
    params, inputs = draw(graph)
    inputs["x"][::5] = 0
    run = function(graph, dtype=dtype, options=Options(dispatch, platform="cpu"))
    forward = jax.checkpoint(run) if remat else run

    def loss(params, x):
        return jnp.sum(jnp.square(forward(params, {**inputs, "x": x})["y"])) / 2

    return jax.jit(jax.grad(loss, (0, 1)))(params, inputs["x"])


@pytest.mark.slow
@pytest.mark.parametrize("remat", [True, False])
def test_gradients_of_many_rows_are_those_of_all_rows_at_once(remat):
    with jax.enable_x64(True):
        expected, found = slopes("grouped", F64), slopes("blocks", F64, remat)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-9, atol=1e-9)


def test_no_array_of_all_rows_is_made_but_their_results():
    tokens, mlp = 4096, 512
    text = print_graph(layer()).replace("mlp=12", f"mlp={mlp}")
    text = text.replace("token=700", f"token={tokens}")
    graph = parse(text)
    shapes = {n: jax.ShapeDtypeStruct(v.type.shape, np.float32) for n, v in graph.params.items()}
    inputs = {
        "x": jax.ShapeDtypeStruct((tokens, 4), np.float32),
        "wanted": jax.ShapeDtypeStruct((tokens,), np.bool_),
    }

    def temporaries(dispatch):
        run = function(graph, options=Options(dispatch, platform="cpu"))
        compiled = jax.jit(run).lower(shapes, inputs).compile()
        return int(compiled.memory_analysis().temp_size_in_bytes)

    hidden = 2 * tokens * mlp * 4
    assert temporaries("grouped") > hidden
    assert temporaries("blocks") < hidden / 2
    assert temporaries("auto") == temporaries("blocks")
