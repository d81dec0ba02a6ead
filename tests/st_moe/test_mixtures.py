"""Pieces of routing that are composed of the table, by hand and by law."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moecc.ir import F64, I32, Builder, Graph, tensor
from moecc.ir.moe import (
    emit_hash_routing,
    emit_prototypes,
    emit_rescaled,
    emit_soft_slots,
)
from moecc.model.initialise import updated_bias
from moecc.testing import run_reference

from .layers import normal, softmax

SEEDS = st.integers(0, 2**32 - 1)


@given(SEEDS, st.sampled_from(["renormalised", "softmax", "sigmoid"]), st.floats(0.3, 1.5))
def test_rescaled_gates_keep_their_sum(seed, gates, factor):
    graph = Graph()
    b = Builder(graph)
    logits = graph.input("l", tensor(F64, token="T", expert=4))
    experts, weights = b.route(logits, top_k=3, gates=gates)
    slots = b.assign_slots(
        experts, tokens="token", experts=4, slots="capacity", capacity_factor=factor, minimum=1
    )
    for name, value in {"g": weights, "p": slots, "r": emit_rescaled(b, weights, slots)}.items():
        graph.set_output(name, value)
    outputs = run_reference(graph, inputs={"l": normal(seed, 12, 4)})
    gates, kept, rescaled = outputs["g"], outputs["p"] >= 0, outputs["r"]
    sums = np.where(kept.any(1), gates.sum(1), 0)
    np.testing.assert_allclose(rescaled.sum(1), sums, rtol=1e-12)
    assert (rescaled[~kept] == 0).all()
    whole = kept.all(1)
    np.testing.assert_allclose(rescaled[whole], gates[whole], rtol=1e-12)
    assert (rescaled[kept] / gates[kept] >= 1 - 1e-12).all()


@given(SEEDS, st.sampled_from([1, 2, 3, 6]))
def test_prototypes_are_top_1_in_each_group(seed, prototypes):
    graph = Graph()
    b = Builder(graph)
    logits = graph.input("l", tensor(F64, token="T", expert=6))
    for name, value in zip("eg", emit_prototypes(b, logits, prototypes), strict=True):
        graph.set_output(name, value)
    data = normal(seed, 9, 6)
    found = run_reference(graph, inputs={"l": data})
    parts = data.reshape(9, prototypes, -1)
    best = parts.argmax(-1)
    np.testing.assert_array_equal(found["e"], best + np.arange(prototypes) * (6 // prototypes))
    np.testing.assert_allclose(found["g"], softmax(parts).max(-1), rtol=1e-12)


def test_a_soft_mixture_is_two_products():
    """Y = C · f(Dᵀ X), D over tokens and C over slots (Puigcerver et al. 2023, eq. 1 to 3)."""
    graph = Graph()
    b = Builder(graph)
    x = graph.input("x", tensor(F64, batch="B", seq="S", embed=3))
    phi = graph.param("phi", tensor(F64, expert=4, slot=2, embed=3))
    rows, weights = emit_soft_slots(b, x, phi)
    graph.set_output("y", b.contract(weights, b.square(rows), over=("expert", "slot")))
    rng = np.random.default_rng(0)
    data, parts = rng.normal(size=(2, 5, 3)), rng.normal(size=(4, 2, 3))
    found = run_reference(graph, inputs={"x": data}, params={"phi": parts})["y"]
    logits = np.einsum("bsd,nd->bsn", data, parts.reshape(8, 3))
    slots = np.einsum("bsn,bsd->bnd", softmax(logits, 1), data)
    expected = np.einsum("bsn,bnd->bsd", softmax(logits, 2), slots**2)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_hash_gates_are_equal_and_add_up_to_one():
    graph = Graph()
    ids = graph.input("ids", tensor(I32, token="T"))
    x = graph.input("x", tensor(F64, token="T", embed=2))
    experts, gates = emit_hash_routing(Builder(graph), ids, x, experts=8, top_k=4, seed=2)
    graph.set_output("e", experts)
    graph.set_output("g", gates)
    found = run_reference(graph, inputs={"ids": np.arange(5), "x": np.zeros((5, 2))})
    assert (found["g"] == 0.25).all()
    assert all(len(set(row)) == 4 for row in found["e"].tolist())


# --- rules beside the graph


def test_the_bias_moves_towards_the_idle():
    bias, load = np.array([0.5, 0.0, 0.0, 0.0]), np.array([9, 1, 2, 4])
    np.testing.assert_allclose(updated_bias(bias, load), [0.499, 0.001, 0.001, 0.0])
    layers = updated_bias(np.zeros((2, 2)), np.array([[3, 1], [2, 2]]), 0.1)
    np.testing.assert_allclose(layers, [[-0.1, 0.1], [0, 0]])
