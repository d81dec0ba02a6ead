"""The ways of routing of ``upcycle``: prototypes, hashes, soft mixtures; a bias of the choice."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moecc_passes.upcycle.upcycle import UpcyclePass

from moecc.errors import InputError
from moecc.ir import F64, I32, Builder, Graph, tensor
from moecc.model.initialise import updated_bias
from moecc.rewrite.passes import Context
from tests.st_moe.layers import attend, softmax

from .dense_blocks import EXACT, Dense, Tensors, error, relative, run, shown, tokens, upcycled


def same_function(graph, inputs, **options):
    """Check that a conversion changes nothing; return its graph and what it returns."""
    after, result = upcycled(graph, **options)
    assert result.preserves.kind == "reassociation"
    assert error(graph, after, inputs) <= EXACT
    shown(after, "route", "assign_slots", "hash_experts")
    return after, run(after, Tensors(graph).params(after), inputs)


# --- prototypes


@given(st.sampled_from([(4, 2), (6, 3), (8, 4), (4, 4), (4, 1)]))
def test_prototypes_keep_the_function(sizes):
    experts, top_k = sizes
    dense = Dense(layers=2, bias_out=True)
    options = {"routing": "prototypes", "experts": experts, "top_k": top_k, "router_std": 0.5}
    after, found = same_function(dense.graph(), tokens(dense), **options)
    assert found["assign_slots.0"].shape[-1] == top_k
    assert (found["assign_slots.0"] >= 0).all()
    assert sum(n.op.name == "route" for n in after) == 2


# --- hashes


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_a_hash_keeps_the_function_and_sends_a_token_where_its_id_says(top_k):
    dense = Dense(layers=2)
    graph = dense.graph()
    graph.input("tokens", tensor(I32, batch="B", seq="S"))
    ids = np.random.default_rng(0).integers(0, 5, (2, 6)).astype(np.int32)
    inputs = {**tokens(dense), "tokens": ids}
    after, found = same_function(graph, inputs, routing="hash", experts=4, top_k=top_k)
    chosen = found["hash_experts.0"]
    for i in np.unique(ids):
        assert len({tuple(c) for c in chosen[ids == i]}) == 1
    assert not any("router" in n for n in after.params)
    assert not any(n.op.routes for n in after)


# --- soft mixtures


def test_a_soft_mixture_by_its_formula():
    """Y = C f(Dᵀ X) with logits of unit vectors (Puigcerver et al. 2023, eq. 1-3, section 2.3)."""
    dense = Dense(embed=6, mlp=4)
    graph = dense.graph()
    tensors = Tensors(graph)
    after, result = upcycled(graph, routing="soft", experts=3, soft_slots=2, router_std=1.0)
    assert result.preserves.kind == "approximate"
    assert "averages of tokens" in result.preserves.reason
    params = tensors.params(after)
    scale = params["layers.0.ffn.router.scale"] = np.array(2.5)
    x = tokens(dense)["x"]
    found = run(after, params, {"x": x})["y"]
    phi = params["layers.0.ffn.router.weight"].reshape(6, 6)
    unit = [v / np.sqrt((v**2).sum(-1, keepdims=True) + 1e-6) for v in (x, phi)]
    logits = unit[0] @ (scale * unit[1]).T
    rows = np.einsum("bsn,bsd->bnd", softmax(logits, 1), x)
    gate, up, down = (tensors.arrays[f"layers.0.{n}"] for n in ("gate", "up", "down"))
    hidden = (rows @ gate.T) / (1 + np.exp(-(rows @ gate.T))) * (rows @ up.T)
    expected = np.einsum("bsn,bnd->bsd", softmax(logits, 2), hidden @ down.T)
    assert relative(found, expected) <= 1e-11


# --- the bias of loss-free balancing

BIAS = "layers.0.ffn.router.balance_bias"


@pytest.mark.parametrize("gates", ["sigmoid-renormalised", "renormalised"])
def test_a_bias_of_zeros_changes_nothing_and_another_changes_the_choice_alone(gates):
    graph, inputs = Dense().graph(), tokens(Dense())
    options = {"gates": gates, "gate_scale": 2.5, "balance_bias": True, "router_std": 0.5}
    after, _ = same_function(graph, inputs, **options)
    params = Tensors(graph).params(after)
    np.testing.assert_array_equal(params[BIAS], np.zeros(8))
    params[BIAS] = np.where(np.arange(8) == 5, 1e3, 0.0)
    found = run(after, params, inputs)
    assert (found["route.0"][..., 0] == 5).all()
    np.testing.assert_allclose(found["route.1"].sum(-1), 2.5, rtol=1e-12)


def test_the_update_of_the_bias_evens_out_the_loads():
    """On the loads of a skewed router the largest violation falls to a fifth, without a loss."""
    graph = Dense().graph()
    after, _ = upcycled(graph, balance_bias=True, gates="sigmoid-renormalised", router_std=1.0)
    shown(after, "route")
    params = Tensors(graph).params(after)
    # Tokens with a mean give every token the same favourites.
    inputs = {"x": tokens(Dense(), 400)["x"] + 1.0}
    violations = []
    for _ in range(150):
        chosen = run(after, params, inputs)["route.0"]
        loads = np.bincount(chosen.ravel(), minlength=8)
        violations.append(loads.max() / loads.mean() - 1)
        params[BIAS] = updated_bias(params[BIAS], loads, rate=0.01)
    assert violations[0] > 0.5
    assert max(violations[-5:]) < violations[0] / 5


# --- what contradicts itself


@pytest.mark.parametrize("routing", ["soft", "expert-choice"])
def test_what_looks_ahead_is_refused_behind_a_causal_mask(routing):
    graph = Graph("decoder")
    b = Builder(graph)
    x = graph.input("x", tensor(F64, batch="B", seq="S", embed=2))
    x = attend(b, x, x, x, over="embed")
    with b.at("layers.0.ffn"):
        graph.set_output("y", Dense(embed=2, mlp=2).block(b, x, "layers.0"))
    with pytest.raises(InputError, match="decides about a token by later ones"):
        UpcyclePass(routing=routing).apply(graph, Context())
