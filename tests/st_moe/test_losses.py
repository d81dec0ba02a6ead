"""Losses and metrics: the values of ST-MoE and of the code bases, by hand and by law."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moecc_passes.add_losses import AddLossesPass

from moecc.ir import clone
from moecc.ir.devices import simulate
from tests.passes.model_graphs import apply_passes

from .layers import applied, evaluated, logsumexp, losses, normal, router, softmax

SEEDS = st.integers(0, 2**32 - 1)
OVER = ["group", "sequence", "global"]
V_MOE = {"importance_coef": 1.0, "load_coef": 1.0}


# --- the router z-loss


@given(SEEDS, st.floats(-5, 5))
def test_z_loss_of_shifted_logits(seed, shift):
    logits = normal(seed, 2, 3, 4)
    expected = ((logsumexp(logits) + shift) ** 2).mean()
    found = losses(logits + shift, balance="none", metrics=False)
    assert found["loss.router_z"] == pytest.approx(expected, rel=1e-10)


# --- the load balance loss


def balance_of(logits):
    """Return N · Σ f · P, of the shares of first choices and the mean probabilities (Switch)."""
    experts = logits.shape[-1]
    logits = logits.reshape(-1, experts)
    f = np.bincount(logits.argmax(-1), minlength=experts) / len(logits)
    return experts * (f * softmax(logits).mean(0)).sum()


@given(SEEDS, st.sampled_from([2, 4, 8]), st.integers(1, 2))
def test_balance_by_its_formula(seed, experts, top_k):
    """First choices count, whatever top-k is; the lower choices are not balanced (Appendix J)."""
    logits = normal(seed, 2, 6, experts)
    balance = losses(logits, top_k, metrics=False)["loss.balance"]
    assert balance == pytest.approx(balance_of(logits), rel=1e-12)


# --- over what, and without what


@given(SEEDS)
def test_balance_over_groups_sequences_and_the_batch(seed):
    logits = normal(seed, 2, 6, 4)
    of_groups = np.mean([balance_of(group) for group in logits.reshape(4, 3, 4)])
    of_sequences = np.mean([balance_of(row) for row in logits])
    for options, placement, expected in (
        ({}, {"group_size": 3}, of_groups),
        ({"over": "group"}, {"groups": 4}, of_groups),
        ({"over": "sequence"}, {"groups": 4}, of_sequences),
        ({"over": "global"}, {"groups": 4}, balance_of(logits)),
    ):
        found = losses(logits, metrics=False, placement=placement, **options)
        assert found["loss.balance"] == pytest.approx(expected, rel=1e-12), (options, placement)


@given(SEEDS, st.sampled_from(OVER))
def test_padding_counts_nowhere(seed, over):
    """Each sequence of 6 has 4 tokens; without the padding, all losses and metrics are the same."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(2, 6, 4))
    mask = np.stack([rng.permutation(6) < 4 for _ in range(2)])
    short = logits[mask].reshape(2, 4, 4)
    options = {"over": over, "placement": {"groups": 2}, **V_MOE}
    padded, plain = losses(logits, 2, mask, **options), losses(short, 2, **options)
    for name, value in plain.items():
        if name != "y":
            np.testing.assert_allclose(padded[name], value, rtol=1e-11, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("over", OVER)
def test_losses_of_nothing_but_padding_are_zero(over):
    mask = np.zeros((2, 3), bool)
    found = losses(normal(0, 2, 3, 4), 2, mask, over=over, placement={"groups": 2}, **V_MOE)
    for name, value in found.items():
        assert np.isfinite(value).all(), name
        assert not name.startswith("loss.") or value == 0, name


@pytest.mark.parametrize("over", OVER)
def test_losses_are_the_same_on_a_mesh_where_a_device_has_padding_alone(over):
    graph = router(4, 2, mask=True, groups=4)
    applied(AddLossesPass(over=over, **V_MOE), graph)
    whole = clone(graph)
    apply_passes(graph, "annotate-sharding{mesh=data:4 rules=data-parallel},lower-collectives")
    rng = np.random.default_rng(0)
    inputs = {"x": rng.normal(size=(4, 6, 2)), "logits": rng.normal(size=(4, 6, 4))}
    inputs["mask"] = np.repeat(np.arange(4) != 1, 6).reshape(4, 6)
    on_mesh = simulate(graph, {}, inputs).outputs
    for name, value in evaluated(whole, **inputs).items():
        assert np.isfinite(value).all(), name
        np.testing.assert_allclose(on_mesh[name], value, rtol=1e-12, atol=1e-14, err_msg=name)


# --- V-MoE's


@given(SEEDS)
def test_importance_and_load_of_v_moe(seed):
    logits = normal(seed, 1, 10, 5)
    found = losses(logits, 2, importance_coef=0.005, load_coef=0.005, load_noise=0.3)
    total = softmax(logits)[0].sum(0)
    assert found["loss.importance"] == pytest.approx((total.std() / total.mean()) ** 2, rel=1e-10)
    threshold = np.sort(logits[0], axis=1)[:, -2:-1]
    wins = 1 - 0.5 * np.vectorize(math.erfc)((logits[0] - threshold) / 0.3 / math.sqrt(2))
    chance = wins.mean(0)
    assert found["loss.load"] == pytest.approx((chance.std() / chance.mean()) ** 2, rel=1e-9)
    terms = {"balance": 0.01, "router_z": 0.001, "importance": 0.005, "load": 0.005}
    expected = sum(c * found[f"loss.{n}"] for n, c in terms.items())
    assert found["loss.auxiliary"] == pytest.approx(expected, rel=1e-12)


# --- layers, and what other code bases make of the same


def test_losses_of_layers_are_summed_or_averaged():
    logits = {f"logits{i}": normal(i, 2, 3, 4) for i in range(3)}
    single = [losses(v)["loss.balance"] for v in logits.values()]
    for how, expected in (("sum", np.sum(single)), ("mean", np.mean(single))):
        graph = router(4, layers=3)
        applied(AddLossesPass(layers=how), graph)
        found = evaluated(graph, **logits)
        assert found["loss.balance"] == pytest.approx(expected, rel=1e-12)


# --- metrics


def test_entropy_margin_and_gates():
    uniform = losses(np.zeros((1, 4, 32)), 2)
    assert uniform["entropy"] == pytest.approx(math.log(32), rel=1e-14)
    assert uniform["margin"] == pytest.approx(0, abs=1e-15)
    np.testing.assert_allclose(uniform["gate_mean"], [0.5, 0.5])
    logits = np.log([[[0.5, 0.3, 0.2]]])
    found = losses(logits, 2)
    assert found["margin"] == pytest.approx(0.2, rel=1e-12)
    expected = -sum(p * math.log(p) for p in (0.5, 0.3, 0.2))
    assert found["entropy"] == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(found["gate_mean"], [5 / 8, 3 / 8])
    dead = np.log([[[0.5, 0.5, 1.0]]]) - [0, 0, np.inf]
    assert losses(dead)["entropy"] == pytest.approx(math.log(2), rel=1e-12)


def test_drops_and_used_slots_under_a_capacity():
    logits = np.eye(4)[None, [0, 0, 0, 0, 0, 1, 1, 2]]
    bound = {"slots": "capacity", "capacity_factor": 1.0, "minimum": 1}
    found = losses(logits, placement=bound)
    assert found["dropped"] == pytest.approx(3 / 8)
    assert found["utilisation"] == pytest.approx(5 / 8)
    np.testing.assert_allclose(found["loads"], [2 / 5, 2 / 5, 1 / 5, 0])
