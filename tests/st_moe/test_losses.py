"""Losses and metrics: the values of ST-MoE and of the code bases, by hand and by law."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moecc_passes.add_losses import AddLossesPass

from moecc.ir import clone
from moecc.ir.devices import simulate
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline

from .layers import applied, evaluated, router, softmax

SEEDS = st.integers(0, 2**32 - 1)


def losses(logits, top_k=1, mask=None, **options):
    """Return losses and metrics of one layer with these logits, `[batch, seq, expert]`."""
    placement = options.pop("placement", {})
    graph = router(logits.shape[-1], top_k, mask=mask is not None, **placement)
    applied(AddLossesPass(**options), graph)
    more = {} if mask is None else {"mask": mask}
    found = evaluated(graph, logits=logits, **more)
    return {n.removeprefix("metric.layers.0.ffn."): v for n, v in found.items()}


# --- the router z-loss


@given(SEEDS, st.floats(-5, 5))
def test_z_loss_of_shifted_logits(seed, shift):
    logits = np.random.default_rng(seed).normal(size=(2, 3, 4))
    total = np.log(np.exp(logits).sum(-1))
    found = losses(logits + shift, balance="none", metrics=False)
    assert found["loss.router_z"] == pytest.approx(((total + shift) ** 2).mean(), rel=1e-10)


# --- the load balance loss


@given(SEEDS, st.sampled_from([2, 4, 8]), st.integers(1, 2))
def test_balance_by_its_formula(seed, experts, top_k):
    """First choices count, whatever top-k is; the lower choices are not balanced (Appendix J)."""
    logits = np.random.default_rng(seed).normal(size=(2, 6, experts))
    p = softmax(logits)
    f = np.bincount(logits.argmax(-1).ravel(), minlength=experts) / 12
    expected = experts * (f * p.mean((0, 1))).sum()
    found = losses(logits, top_k, metrics=False)
    assert found["loss.balance"] == pytest.approx(expected, rel=1e-12)


# --- over what, and without what


@given(SEEDS)
def test_balance_over_groups_sequences_and_the_batch(seed):
    logits = np.random.default_rng(seed).normal(size=(2, 6, 4))

    def of(part):
        f = np.bincount(part.argmax(-1).ravel(), minlength=4) / (part.size / 4)
        return float(4 * (f * softmax(part).reshape(-1, 4).mean(0)).sum())

    groups = [of(part) for part in logits.reshape(4, 3, 4)]
    for over, expected in (
        ("group", np.mean(groups)),
        ("sequence", np.mean([of(row) for row in logits])),
        ("global", of(logits)),
    ):
        found = losses(logits, over=over, metrics=False, placement={"groups": 4})
        assert found["loss.balance"] == pytest.approx(expected, rel=1e-12)
    by_size = losses(logits, metrics=False, placement={"group_size": 3})
    assert by_size["loss.balance"] == pytest.approx(np.mean(groups), rel=1e-12)


@given(SEEDS, st.sampled_from(["group", "sequence", "global"]))
def test_padding_counts_nowhere(seed, over):
    """Each sequence of 6 has 4 tokens; without the padding, all losses and metrics are the same."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(2, 6, 4))
    mask = np.stack([rng.permutation(6) < 4 for _ in range(2)])
    short = logits[mask].reshape(2, 4, 4)
    options = {
        "over": over, "importance_coef": 1.0, "load_coef": 1.0, "placement": {"groups": 2}
    }  # fmt: skip
    padded, plain = losses(logits, 2, mask, **options), losses(short, 2, **options)
    for name, value in plain.items():
        if name != "y":
            np.testing.assert_allclose(padded[name], value, rtol=1e-11, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("over", ["group", "sequence", "global"])
def test_losses_of_nothing_but_padding_are_zero(over):
    logits = np.random.default_rng(0).normal(size=(2, 3, 4))
    options = {"importance_coef": 1.0, "load_coef": 1.0}
    found = losses(logits, 2, np.zeros((2, 3), bool), over=over, placement={"groups": 2}, **options)
    for name, value in found.items():
        assert np.isfinite(value).all(), name
        assert not name.startswith("loss.") or value == 0, name


@pytest.mark.parametrize("over", ["group", "sequence", "global"])
def test_losses_are_the_same_on_a_mesh_where_a_device_has_padding_alone(over):
    graph = router(4, 2, mask=True, groups=4)
    applied(AddLossesPass(over=over, importance_coef=1.0, load_coef=1.0), graph)
    whole = clone(graph)
    text = "annotate-sharding{mesh=data:4 rules=data-parallel},lower-collectives"
    run_pipeline(graph, Pipeline.parse(text))
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
    logits = np.random.default_rng(seed).normal(size=(1, 10, 5))
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
    rng = np.random.default_rng(0)
    logits = {f"logits{i}": rng.normal(size=(2, 3, 4)) for i in range(3)}
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
    assert round(math.log(32), 3) == 3.466
    assert uniform["margin"] == pytest.approx(0, abs=1e-15)
    np.testing.assert_allclose(uniform["gate_mean"], [0.5, 0.5])
    logits = np.log(np.array([[[0.5, 0.3, 0.2]]]))
    found = losses(logits, 2)
    assert found["margin"] == pytest.approx(0.2, rel=1e-12)
    expected = -sum(p * math.log(p) for p in (0.5, 0.3, 0.2))
    assert found["entropy"] == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(found["gate_mean"], [5 / 8, 3 / 8])
    dead = np.log(np.array([[[0.5, 0.5, 1e-300]]]))
    dead[..., 2] = -np.inf
    assert losses(dead)["entropy"] == pytest.approx(math.log(2), rel=1e-12)


def test_drops_and_used_slots_under_a_capacity():
    logits = np.zeros((1, 8, 4))
    for token, expert in enumerate([0, 0, 0, 0, 0, 1, 1, 2]):
        logits[0, token, expert] = 1
    bound = {"slots": "capacity", "capacity_factor": 1.0, "minimum": 1}
    found = losses(logits, placement=bound)
    assert found["dropped"] == pytest.approx(3 / 8)
    assert found["utilisation"] == pytest.approx(5 / 8)
    np.testing.assert_allclose(found["loads"], [2 / 5, 2 / 5, 1 / 5, 0])
