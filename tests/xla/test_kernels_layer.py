"""Whole sparse layers made of the kernels against a dense float64 layer, gradients included."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from tiers import examples

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from moecc_backends.xla.dispatch import flat as perm  # noqa: E402
from moecc_backends.xla.dispatch.sorted_rows import permute, unpermute  # noqa: E402
from moecc_backends.xla.kernels.grouped_matmul import (  # noqa: E402
    grouped_matmul,
    repeat_by_group,
    slot_matmul,
)

TOKENS, CHOICES, NUM_EXPERTS, EMBED, MLP = 24, 2, 4, 6, 10


class Weights(NamedTuple):
    """Experts that differ, so that a gradient that goes to the wrong one is seen."""

    gate: Any
    up: Any
    down: Any
    bias: Any


class Case(NamedTuple):
    """One layer's input: slots are -1 where a choice is not placed."""

    experts: Any
    slots: Any
    tokens: Any
    gates: Any
    weights: Weights


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a routing (spread, skewed, or all to one expert) and which choices are placed."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    used = draw(st.integers(CHOICES, NUM_EXPERTS))
    scores = rng.random((TOKENS, used))
    experts = np.argsort(scores, axis=1)[:, :CHOICES].astype(np.int32)
    if draw(st.booleans()):
        experts[:] = rng.integers(NUM_EXPERTS)
    capacity = draw(st.sampled_from((0, 3, TOKENS * CHOICES)))
    return _case(experts, _slots(experts, capacity), rng)


def _case(experts: np.ndarray, slots: np.ndarray, rng: np.random.Generator) -> Case:
    shapes = ((MLP, EMBED), (MLP, EMBED), (EMBED, MLP), (MLP,))
    weights = Weights(*(rng.standard_normal((NUM_EXPERTS, *shape)) for shape in shapes))
    tokens = rng.standard_normal((TOKENS, EMBED))
    return Case(experts, slots, tokens, rng.random((TOKENS, CHOICES)), weights)


def _slots(experts: np.ndarray, capacity: int) -> np.ndarray:
    flat = experts.reshape(-1)
    ranks = np.array([(flat[:i] == e).sum() for i, e in enumerate(flat)])
    return np.where(ranks < capacity, ranks, -1).astype(np.int32).reshape(experts.shape)


def dense(case: Case, tokens: Any, gates: Any, w: Weights) -> Any:
    """Run every expert on every token, and weigh the results: the meaning of the layer."""
    kept = jnp.where(case.slots >= 0, gates, 0)
    mix = jnp.einsum("tk,tke->te", kept, jax.nn.one_hot(case.experts, NUM_EXPERTS))
    hidden = jax.nn.silu(jnp.einsum("td,efd->tef", tokens, w.gate) + w.bias)
    hidden = hidden * jnp.einsum("td,efd->tef", tokens, w.up)
    return jnp.einsum("te,tef,edf->td", mix, hidden, w.down)


def dropless(case: Case, tokens: Any, gates: Any, w: Weights) -> Any:
    """Run each expert on its own rows, packed."""
    choices = perm.sort_by_expert(case.experts, NUM_EXPERTS, jnp.asarray(case.slots) >= 0)
    permutation = perm.sorted_permutation(choices)
    product = partial(grouped_matmul, group_sizes=choices.group_sizes, contracting_axis=2)
    rows = permute(tokens, permutation)
    gate, up = product(rows, w.gate), product(rows, w.up)
    hidden = jax.nn.silu(gate + repeat_by_group(w.bias, choices.group_sizes, len(rows))) * up
    return unpermute(product(hidden, w.down), permutation, gates)


def capacity(case: Case, tokens: Any, gates: Any, w: Weights, groups: int = 1) -> Any:
    """Run each expert on its slots; as many slots as there are choices, so that any case fits."""
    slots = TOKENS * CHOICES
    permutation = perm.capacity_permutation(
        jnp.asarray(case.experts), case.slots, NUM_EXPERTS, slots, groups, expert_major=True
    )
    rows = permute(tokens, permutation).reshape(NUM_EXPERTS, groups * slots, -1)
    gate = slot_matmul(rows, w.gate, 2) + w.bias[:, None, :]
    hidden = jax.nn.silu(gate) * slot_matmul(rows, w.up, 2)
    down = slot_matmul(hidden, w.down, 2)
    return unpermute(down.reshape(-1, down.shape[-1]), permutation, gates)


LAYERS = {"dropless": dropless, "capacity": capacity}


@partial(jax.jit, static_argnums=0)
def _with_gradients(layer: Any, case: Case, cotangent: Any) -> Any:
    result, pull = jax.vjp(partial(layer, case), case.tokens, case.gates, case.weights)
    return result, *pull(cotangent)


@pytest.mark.parametrize("name", LAYERS)
@given(case=cases())
@settings(max_examples=examples(8, 30))
def test_layer_is_the_dense_layer(name: str, case: Case) -> None:
    cotangent = np.random.default_rng(1).standard_normal(case.tokens.shape)
    with jax.enable_x64(True):
        expected = _with_gradients(dense, case, cotangent)
        found = _with_gradients(LAYERS[name], case, cotangent)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11)


def test_rows_that_nothing_is_placed_in_are_zero_both_ways() -> None:
    permutation = perm.Permutation(jnp.array([1, -1, 2, -1]), jnp.array([[-1, 0], [2, -1]]))
    tokens, gates = jnp.array([[1.0], [2.0]]), jnp.array([[3.0, 4.0], [5.0, 6.0]])
    rows = permute(tokens, permutation)
    np.testing.assert_array_equal(rows, [[1], [0], [2], [0]])
    poisoned = jnp.where(rows == 0, jnp.nan, rows)
    result, pull = jax.vjp(lambda r, g: unpermute(r, permutation, g), poisoned, gates)
    np.testing.assert_array_equal(result, [[4], [10]])
    d_rows, d_gates = pull(jnp.array([[7.0], [8.0]]))
    np.testing.assert_array_equal(d_rows, [[28], [0], [40], [0]])
    np.testing.assert_array_equal(d_gates, [[0, 7], [16, 0]])


def test_groups_side_by_side_change_nothing() -> None:
    rng = np.random.default_rng(2)
    experts = rng.integers(0, NUM_EXPERTS, (TOKENS, CHOICES), dtype=np.int32)
    slots = np.concatenate([_slots(half, TOKENS) for half in np.split(experts, 2)])
    case = _case(experts, slots, rng)
    with jax.enable_x64(True):
        found = capacity(case, case.tokens, case.gates, case.weights, groups=2)
        expected = dense(case, case.tokens, case.gates, case.weights)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (ml_dtypes.bfloat16, 0.04)])
def test_narrow_types_stay_close(name: str, dtype: Any, tolerance: float) -> None:
    rng = np.random.default_rng(3)
    experts = rng.integers(0, NUM_EXPERTS, (TOKENS, CHOICES), dtype=np.int32)
    wide = _case(experts, _slots(experts, 10), rng)
    cotangent = rng.standard_normal(wide.tokens.shape).astype(dtype)
    narrow = wide._replace(
        tokens=wide.tokens.astype(dtype),
        weights=Weights(*(w.astype(dtype) for w in wide.weights)),
        gates=wide.gates.astype(np.float32),
    )
    found = jax.tree.leaves(_with_gradients(LAYERS[name], narrow, cotangent))
    with jax.enable_x64(True):
        same = jax.tree.map(lambda x: x.astype(np.float64), narrow._replace(experts=experts))
        same = same._replace(experts=experts, slots=wide.slots)
        expected = jax.tree.leaves(_with_gradients(dense, same, cotangent.astype(np.float64)))
    for a, b in zip(found, expected, strict=True):
        error = np.abs(np.asarray(a).astype(np.float64) - np.asarray(b)).max()
        assert error <= tolerance * np.abs(b).max()


@pytest.mark.parametrize("name", LAYERS)
def test_no_ragged_dot_and_no_scattered_sums(name: str) -> None:
    rng = np.random.default_rng(4)
    experts = rng.integers(0, NUM_EXPERTS, (TOKENS, CHOICES), dtype=np.int32)
    case = _case(experts, _slots(experts, 5), rng)
    program = str(jax.make_jaxpr(partial(_with_gradients, LAYERS[name]))(case, case.tokens))
    assert "ragged" not in program
    scattered = [line for line in program.splitlines() if "scatter-add" in line]
    # Counting the rows of each expert is one, of integers; a gradient would be one of floats.
    assert all("i32" in line.split("=")[0] for line in scattered)
    assert "dot_general" in program


@given(cases())
@settings(max_examples=examples(8, 20))
def test_unplaced_choices_have_no_gradient(case: Case) -> None:
    _, d_tokens, d_gates, _ = _with_gradients(dropless, case, np.ones_like(case.tokens))
    unplaced = case.slots < 0
    np.testing.assert_array_equal(np.asarray(d_gates)[unplaced], 0)
    np.testing.assert_array_equal(np.asarray(d_tokens)[unplaced.all(axis=1)], 0)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_runs_in_a_shard_map(name: str) -> None:
    rng = np.random.default_rng(5)
    experts = rng.integers(0, NUM_EXPERTS, (TOKENS, CHOICES), dtype=np.int32)
    case = _case(experts, _slots(experts, 10), rng)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    spec = jax.sharding.PartitionSpec("data")

    def local(case: Case, cotangent: Any) -> Any:
        return _with_gradients(LAYERS[name], case, cotangent)

    sharded = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(spec, spec), out_specs=spec))
    found = jax.tree.leaves(sharded(case, case.tokens))
    expected = jax.tree.leaves(_with_gradients(LAYERS[name], case, case.tokens))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
