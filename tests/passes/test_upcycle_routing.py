"""The ways of routing of ``upcycle``: prototypes, hashes, soft mixtures; a bias of the choice."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moecc_passes.upcycle.upcycle import UpcyclePass

from moecc.errors import InputError, UsageError
from moecc.ir import F64, I32, Builder, Graph, tensor
from moecc.model.initialise import updated_bias
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline
from moecc.testing import laws

from .dense_blocks import Dense, Tensors, relative, run, tokens, upcycled

EXACT = 1e-12


def with_ids(dense, *names):
    """Return the graph of `dense` with inputs of token ids."""
    graph = dense.graph()
    for name in names:
        graph.input(name, tensor(I32, batch="B", seq="S"))
    return graph


def shown(graph, *ops):
    """Let `graph` return the results of the operations `ops` of its last layer, too."""
    for node in list(graph):
        if node.op.name in ops:
            for value in node.results:
                graph.set_output(f"{node.op.name}.{value.index}", value)
    return graph


def same_function(dense, graph, more, **options):
    tensors = Tensors(graph)
    after, result = upcycled(graph, **options)
    laws.check_graph(after)
    assert result.preserves.kind == "reassociation"
    inputs = {**tokens(dense), **more}
    expected = run(graph, tensors.params(graph), inputs)["y"]
    params = tensors.params(after)
    found = run(shown(after, "route", "assign_slots", "hash_experts"), params, inputs)
    assert relative(found["y"], expected) <= EXACT
    return after, found


# --- prototypes


@given(st.sampled_from([(4, 2), (6, 3), (8, 4), (4, 4), (4, 1)]))
def test_prototypes_keep_the_function(sizes):
    experts, top_k = sizes
    dense = Dense(layers=2, bias_out=True)
    after, found = same_function(
        dense, dense.graph(), {}, routing="prototypes", experts=experts, top_k=top_k, router_std=0.5
    )
    assert found["assign_slots.0"].shape[-1] == top_k
    assert (found["assign_slots.0"] >= 0).all()
    assert sum(n.op.name == "route" for n in after) == 2


# --- hashes


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_a_hash_keeps_the_function_and_sends_a_token_where_its_id_says(top_k):
    dense = Dense(layers=2)
    graph = with_ids(dense, "tokens")
    ids = np.random.default_rng(0).integers(0, 5, (2, 6)).astype(np.int32)
    after, found = same_function(
        dense, graph, {"tokens": ids}, routing="hash", experts=4, top_k=top_k
    )
    chosen = found["hash_experts.0"]
    for i in np.unique(ids):
        assert len({tuple(c) for c in chosen[ids == i]}) == 1
    assert not any("router" in n for n in after.params)
    assert not any(n.op.name == "route" for n in after)


# --- soft mixtures


def test_a_soft_mixture_by_its_formula():
    """Y = C f(Dᵀ X) with logits of unit vectors (Puigcerver et al. 2023, eq. 1-3, section 2.3)."""
    dense = Dense(embed=6, mlp=4)
    graph = dense.graph()
    tensors = Tensors(graph)
    after, result = upcycled(graph, routing="soft", experts=3, soft_slots=2, router_std=1.0)
    laws.check_graph(after)
    assert result.preserves.kind == "approximate"
    assert "averages of tokens" in result.preserves.reason
    params = tensors.params(after)
    scale = params["layers.0.ffn.router.scale"] = np.array(2.5)
    x = tokens(dense)["x"]
    found = run(after, params, {"x": x})["y"]
    phi = params["layers.0.ffn.router.weight"].reshape(6, 6)
    unit = [v / np.sqrt((v**2).sum(-1, keepdims=True) + 1e-6) for v in (x, phi)]
    logits = unit[0] @ (scale * unit[1]).T
    over_tokens, over_slots = (
        np.exp(logits) / np.exp(logits).sum(a, keepdims=True) for a in (1, 2)
    )
    rows = np.einsum("bsn,bsd->bnd", over_tokens, x)
    w = {n: tensors.arrays[f"layers.0.{n}"] for n in ("gate", "up", "down")}
    gate = rows @ w["gate"].T
    results = (gate / (1 + np.exp(-gate)) * (rows @ w["up"].T)) @ w["down"].T
    assert relative(found, np.einsum("bsn,bnd->bsd", over_slots, results)) <= 1e-11


# --- the bias of loss-free balancing


@pytest.mark.parametrize("gates", ["sigmoid-renormalised", "renormalised"])
def test_a_bias_of_zeros_changes_nothing_and_another_changes_the_choice_alone(gates):
    dense = Dense()
    graph = dense.graph()
    options = {"gates": gates, "gate_scale": 2.5, "balance_bias": True, "router_std": 0.5}
    after, _ = same_function(dense, graph, {}, **options)
    params = Tensors(graph).params(after)
    bias = "layers.0.ffn.router.balance_bias"
    np.testing.assert_array_equal(params[bias], np.zeros(8))
    params[bias] = np.where(np.arange(8) == 5, 1e3, 0.0)
    found = run(after, params, tokens(dense))
    assert (found["route.0"][..., 0] == 5).all()
    np.testing.assert_allclose(found["route.1"].sum(-1), 2.5, rtol=1e-12)


def test_the_update_of_the_bias_evens_out_the_loads():
    """On the loads of a skewed router the largest violation falls to a fifth, without a loss."""
    dense = Dense()
    graph = dense.graph()
    after, _ = upcycled(graph, balance_bias=True, gates="sigmoid-renormalised", router_std=1.0)
    shown(after, "route")
    params = Tensors(graph).params(after)
    # Tokens with a mean give every token the same favourites.
    inputs = {"x": tokens(dense, 400)["x"] + 1.0}
    violations = []
    for _ in range(150):
        chosen = run(after, params, inputs)["route.0"]
        loads = np.bincount(chosen.ravel(), minlength=8)
        violations.append(loads.max() / loads.mean() - 1)
        name = "layers.0.ffn.router.balance_bias"
        params[name] = updated_bias(params[name], loads, rate=0.01)
    assert violations[0] > 0.5
    assert max(violations[-5:]) < violations[0] / 5


# --- one thing under two names


# --- what contradicts itself


@pytest.mark.parametrize(
    ("options", "where", "message"),
    [
        ("routing=prototypes experts=8 top-k=3", "top-k", "a divisor of experts=8"),
        ("routing=prototypes gates=sigmoid", "gates", "a softmax of its own"),
        ("routing=prototypes granularity=2", "granularity", "granularity=1"),
        ("routing=hash gates=softmax", "gates", "no scores that gates"),
        ("routing=hash gate-scale=2.0", "gate-scale", "gate-scale=1.0"),
        ("routing=hash balance-bias", "balance-bias", "balance-bias=false"),
        ("routing=soft slots=capacity", "slots", "drops nothing"),
        ("routing=soft soft-slots=0", "soft-slots", "at least 1"),
        ("routing=soft decoder-layers=every:2", "decoder-layers", "Appendix D"),
        ("routing=expert-choice decoder-layers=all", "decoder-layers", "Appendix D"),
        ("routing=expert-choice layers=decoder.layers.*", "layers", "Appendix D"),
        ("balance-bias gates=ones", "balance-bias", "no score that a bias"),
        ("capacity-factor=0.0", "capacity-factor", "1.25 in training, 2.0"),
        ("top-k=9", "top-k", "ST-MoE has top-k=2"),
    ],
)
def test_what_contradicts_itself_is_refused_when_it_is_read(options, where, message):
    with pytest.raises(UsageError) as caught:
        Pipeline.parse(f"upcycle{{{options}}}")
    (problem,) = caught.value.problems
    assert message in str(problem)
    option = re.search(rf"\b{where}\b", f"upcycle{{{options}}}")
    assert problem.where.endswith(f":{option.start() + 1}")


@pytest.mark.parametrize("routing", ["soft", "expert-choice"])
def test_what_looks_ahead_is_refused_behind_a_causal_mask(routing):
    graph = Graph("decoder")
    b = Builder(graph)
    x = graph.input("x", tensor(F64, batch="B", seq="S", embed=2))
    here = b.positions(x, axis="seq")
    seen = b.causal(here, b.rename(here, axis="seq", to="kv_seq"))
    keys = b.rename(x, axis="seq", to="kv_seq")
    scores = b.mask(b.contract(x, keys, over="embed"), seen)
    x = b.contract(b.softmax(scores, axis="kv_seq"), keys, over="kv_seq")
    with b.at("layers.0.ffn"):
        graph.set_output("y", Dense(embed=2, mlp=2).block(b, x, "layers.0"))
    with pytest.raises(InputError, match="decides about a token by later ones"):
        UpcyclePass(routing=routing).apply(graph, Context())
