"""Numbers that must come out: of the ST-MoE paper, and of the code bases that implement it.

Losses have theirs in `test_losses`, who gets a slot in `test_slots`, layouts in ``tests/passes``,
parameter counts with the presets.
Formulas of drop rates are those of a binomial load: tokens choose independently and evenly.
"""

from __future__ import annotations

from itertools import pairwise
from math import exp, lgamma, log, log1p
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecc.ir import BF16, F32, F64, Builder, Graph, tensor
from moecc.ir.ops.slots import capacity
from moecc.testing import run_reference
from moecc.weights.arithmetic import round_to

from .layers import best, slots

SEEDS = st.integers(0, 2**32 - 1)

PAPER: dict[str, Any] = {"convention": "tokens", "rounding": "floor", "multiple": 1, "minimum": 4,
                         "cap": True}  # fmt: skip
CODE_BASES: dict[str, dict[str, Any]] = {
    "mesh-tensorflow": PAPER,
    "flaxformer": {**PAPER, "rounding": "round", "cap": False},
    "vmoe": {"convention": "assignments", "rounding": "ceil", "multiple": 4, "minimum": 1,
             "cap": False},
}  # fmt: skip


@pytest.mark.parametrize(
    ("tokens", "factor", "experts", "expected"),
    [
        (4096, 1.25, 64, (80, 80, 80)),
        (4096, 2.0, 64, (128, 128, 128)),
        (2048, 1.25, 32, (80, 80, 80)),
        (456, 1.25, 32, (17, 18, 20)),
        (456, 2.0, 32, (28, 28, 32)),
        (128, 1.25, 64, (4, 4, 4)),
        (64, 64.0, 8, (64, 512, 512)),
    ],
)
def test_capacities_of_three_conventions(
    tokens: int, factor: float, experts: int, expected: tuple[int, int, int]
) -> None:
    found = [
        capacity({**rule, "capacity_factor": factor, "experts": experts}, tokens, 1)
        for rule in CODE_BASES.values()
    ]
    assert tuple(found) == expected


@given(st.integers(1, 5000), st.floats(0.01, 10), st.integers(1, 256), st.integers(1, 8))
def test_conventions_agree_up_to_k(tokens: int, factor: float, experts: int, k: int) -> None:
    """CF by assignments is k · CF by tokens; the capped one never exceeds the group."""
    attrs = {**PAPER, "capacity_factor": factor, "experts": experts, "minimum": 1}
    by_choice = capacity({**attrs, "convention": "assignments"}, tokens, k)
    assert by_choice <= tokens
    open_ended = capacity({**attrs, "convention": "assignments", "cap": False}, tokens, k)
    assert by_choice == min(open_ended, tokens)
    assert capacity({**attrs, "cap": False}, tokens * k, 1) == open_ended
    multiple = capacity({**attrs, "multiple": 4, "cap": False}, tokens, 1)
    assert multiple % 4 == 0
    assert 0 <= multiple - capacity({**attrs, "cap": False}, tokens, 1) < 4


# --- what is dropped


def dropped_share(tokens: int, experts: int, slots_each: int) -> float:
    """Return E/S · Σ (n − C)⁺ P(n) for a binomial load n of S tokens on each of E experts."""
    p = 1 / experts

    def chance(n: int) -> float:
        ways = lgamma(tokens + 1) - lgamma(n + 1) - lgamma(tokens - n + 1)
        return exp(ways + n * log(p) + (tokens - n) * log1p(-p))

    over = sum((n - slots_each) * chance(n) for n in range(slots_each + 1, tokens + 1))
    return experts / tokens * over


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "share"),
    [
        (4096, 64, 0.5, 0.5000),
        (4096, 64, 0.75, 0.2507),
        (4096, 64, 1.0, 0.04941),
        (4096, 64, 1.25, 0.00127),
        (4096, 64, 2.0, 0.0),
        (456, 32, 1.0, 0.1121),
        (456, 32, 1.25, 0.0367),
        (456, 32, 2.0, 3.8e-5),
    ],
)
def test_drop_rates_of_even_routing(tokens: int, experts: int, factor: float, share: float) -> None:
    limit = capacity({**PAPER, "capacity_factor": factor, "experts": experts}, tokens, 1)
    exact = dropped_share(tokens, experts, limit)
    assert exact == pytest.approx(share, rel=6e-3, abs=6e-5)
    rng = np.random.default_rng(0)
    found = [
        (slots(rng.integers(0, experts, (tokens, 1)), experts, capacity_factor=factor) < 0).mean()
        for _ in range(16384 // tokens)
    ]
    assert np.mean(found) == pytest.approx(exact, abs=0.004)


@given(SEEDS, st.integers(2, 6), st.integers(1, 3))
def test_a_factor_of_the_number_of_experts_never_drops(seed: int, experts: int, k: int) -> None:
    k = min(k, experts)
    rng = np.random.default_rng(seed)
    choices = best(rng.normal(size=(24, experts)) + 5 * rng.normal(size=experts), k)
    assert (slots(choices, experts, capacity_factor=float(experts)) >= 0).all()
    by_choice = {"capacity_factor": experts / k, "convention": "assignments", "rounding": "ceil"}
    assert (slots(choices, experts, **by_choice) >= 0).all()


@given(SEEDS, st.sampled_from([0.5, 1.0, 1.25, 2.0]))
def test_how_many_are_kept(seed: int, factor: float) -> None:
    """Per expert min(C, n1 + n2), in all at most E · C; first choices min(C, n1)."""
    scores = np.random.default_rng(seed).normal(size=(48, 6))
    choices = best(scores, 2)
    limit = capacity({**PAPER, "capacity_factor": factor, "experts": 6}, 48, 2)
    found = slots(choices, 6, capacity_factor=factor)
    for expert in range(6):
        mine = choices == expert
        assert (found[mine] >= 0).sum() == min(limit, mine.sum())
        assert (found[:, 0][mine[:, 0]] >= 0).sum() == min(limit, mine[:, 0].sum())
    kept = (found >= 0).sum()
    assert kept <= 6 * limit
    if factor < 2:
        assert kept / 96 <= factor / 2


@given(SEEDS)
def test_drops_are_monotone_in_the_capacity(seed: int) -> None:
    choices = best(np.random.default_rng(seed).normal(size=(48, 6)), 2)
    kept = [slots(choices, 6, capacity_factor=c) >= 0 for c in (0.5, 0.75, 1.0, 1.25, 2.0, 6.0)]
    assert all((a <= b).all() for a, b in pairwise(kept))


@given(SEEDS, st.sampled_from([0.5, 1.25]))
def test_combine_weights(seed: int, factor: float) -> None:
    """A slot holds one token at most, and the weights of a token add up to 1 at most."""
    graph = Graph()
    b = Builder(graph)
    logits = graph.input("l", tensor(F64, token="T", expert=6))
    experts, gates = b.route(logits, top_k=2)
    slots = b.assign_slots(
        experts, tokens="token", experts=6, slots="capacity", capacity_factor=factor, minimum=4
    )
    for name, value in {"e": experts, "g": gates, "p": slots}.items():
        graph.set_output(name, value)
    found = run_reference(graph, inputs={"l": np.random.default_rng(seed).normal(size=(48, 6))})
    kept = found["p"] >= 0
    taken = np.stack([found["e"][kept], found["p"][kept]], 1)
    assert len(np.unique(taken, axis=0)) == len(taken)
    weight = np.where(kept, found["g"], 0).sum(1)
    assert (weight <= 1 + 1e-12).all()
    np.testing.assert_allclose(weight[kept.all(1)], 1, rtol=1e-12)
    assert (found["g"][:, 0] >= 0.5 - 1e-12).all()


# --- gates


def test_what_unnormalised_gates_leave_of_a_block() -> None:
    """Σ of the two largest of eight probabilities, logits normal with variance 1: about 0.56."""
    logits = np.random.default_rng(0).normal(size=(20000, 8))
    graph = Graph()
    x = graph.input("l", tensor(F64, token="T", expert=8))
    _, gates = Builder(graph).route(x, top_k=2, gates="softmax")
    graph.set_output("g", gates)
    total = run_reference(graph, inputs={"l": logits})["g"].sum(1)
    assert total.mean() == pytest.approx(0.56, abs=0.01)


def test_a_second_gate_of_a_fifth_is_a_quarter_of_the_first() -> None:
    """The threshold is on renormalised gates: 0.2 of both is 0.25 of the first."""
    graph = Graph()
    x = graph.input("l", tensor(F64, token="T", expert=2))
    _, gates = Builder(graph).route(x, top_k=2)
    graph.set_output("g", gates)
    found = run_reference(graph, inputs={"l": np.array([[0.0, log(0.25)]])})["g"]
    np.testing.assert_allclose(found, [[0.8, 0.2]], rtol=1e-14)


# --- precision (section 3.4)


@pytest.mark.parametrize(
    ("dtype", "value", "spacing"),
    [
        (BF16, 2.0, 0.015625),
        (BF16, 32.0, 0.25),
        (BF16, 1024.0, 8.0),
        (BF16, 2.0**20, 8192.0),
        (BF16, 2.0**30, 8388608.0),
        (F32, 2.0, 2.0**-22),
        (F32, 32.0, 2.0**-18),
        (F32, 1024.0, 2.0**-13),
        (F32, 2.0**20, 0.125),
        (F32, 2.0**30, 128.0),
    ],
)
def test_spacings_of_the_papers_table(dtype: Any, value: float, spacing: float) -> None:
    """The paper prints 8288608 and 2.34e-7, which are misprints."""
    up, half = np.array([value + spacing]), np.array([value + 0.49 * spacing])
    assert round_to(up, dtype).astype(float) == up
    assert round_to(half, dtype).astype(float) == value


def test_a_softmax_on_rounded_logits_is_a_third_off() -> None:
    logits = np.array([128.0] * 10 + [128.5])
    rounded = round_to(logits, BF16).astype(float)
    exact, coarse = (np.exp(v[-1]) / np.exp(v).sum() for v in (logits - 128, rounded - 128))
    assert exact == pytest.approx(0.1415, abs=5e-5)
    assert coarse == pytest.approx(0.0909, abs=5e-5)
    assert coarse / exact - 1 == pytest.approx(-0.36, abs=5e-3)


# --- a constant of another code base's own tests


def test_the_z_loss_of_flaxformers_unit_test() -> None:
    """Its logits are uniform on [−5, 5), `[2, 6, 4]`, from jax's key 0; the loss is 13.786719."""
    jax = pytest.importorskip("jax")
    from moecc_passes.add_losses import AddLossesPass

    from .layers import applied, evaluated, router

    with jax.threefry_partitionable(False):
        logits = jax.random.uniform(jax.random.PRNGKey(0), (2, 6, 4), minval=-5, maxval=5)
    graph = router(4)
    applied(AddLossesPass(balance="none", metrics=False), graph)
    found = evaluated(graph, logits=np.asarray(logits, np.float64))
    assert found["loss.router_z"] == pytest.approx(13.786719, rel=1e-6)
