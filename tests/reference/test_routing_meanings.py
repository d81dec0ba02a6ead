"""Routing: gates by hand, slots against the counting rules, and the numbers of ST-MoE.

Section numbers are those of the ST-MoE paper (Zoph et al. 2022) where none is given.
"""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from moecc.ir import OPS
from moecc.ir.ops.slots import capacity

from .evaluation import assign_slots, compute, evaluate


def route(logits, **attrs):
    return evaluate("route", (logits, "token expert"), **attrs)


def test_the_best_logits_come_first_and_ties_take_the_lowest_expert():
    logits = [[0.0, 3.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0], [-1.0, -np.inf, -2.0, -np.inf]]
    experts, _ = route(logits, top_k=3)
    assert experts.tolist() == [[1, 3, 2], [0, 1, 2], [0, 2, 1]]


LOGITS = [math.log(4), math.log(3), math.log(2), math.log(1)]


@pytest.mark.parametrize(
    ("gates", "expected"),
    [
        ("renormalised", [4 / 7, 3 / 7]),
        ("softmax", [0.4, 0.3]),
        ("sigmoid", [4 / 5, 3 / 4]),
        ("sigmoid-renormalised", [0.8 / 1.55, 0.75 / 1.55]),
        ("sparsemixer", [1.0, 1.0]),
        ("ones", [1.0, 1.0]),
    ],
)
def test_gate_conventions(gates, expected):
    experts, found = route([LOGITS], top_k=2, gates=gates)
    assert experts.tolist() == [[0, 1]]
    assert_allclose(found, [expected], rtol=1e-14)
    _, scaled = route([LOGITS], top_k=2, gates=gates, scale=2.5)
    assert_allclose(scaled, 2.5 * found, rtol=1e-15)


def test_sparsemixer_gives_the_numbers_of_phimoe():
    """transformers 5.24.0, `sparsemixer(scores, jitter_eps=0.01, training=False)`."""
    scores = [
        [0.0, 0, 0, 0],
        [1.0, 0.99, 0.5, -2],
        [2.0, 1.97, 1.95, 1.0],
        [-1.0, -1.01, -1.03, -3.0],
        [0.3, 0.2, 0.1, 5.0],
        [-0.5, 0.49, 0.5, -0.5],
    ]
    experts, gates = route(scores, top_k=2, gates="sparsemixer")
    assert experts.tolist() == [[0, 1], [0, 1], [0, 1], [0, 1], [3, 0], [2, 1]]
    expected = [
        [0.25, 0.333333333],
        [0.502499979, 1.0],
        [0.507499438, 0.504999833],
        [0.502499979, 0.504999833],
        [1.0, 1.0],
        [1.0, 1.0],
    ]
    assert_allclose(gates, expected, atol=1e-9)


# --- capacity


def slots_of(factor, tokens, experts, top_k=1, **attrs):
    attrs |= {"capacity_factor": factor, "experts": experts, "tokens": ("token",)}
    return capacity(OPS["assign_slots"].complete(attrs), tokens, top_k)


@pytest.mark.parametrize(
    ("tokens", "factor", "experts", "floor", "rounded", "ceiled"),
    [
        (4096, 1.25, 64, 80, 80, 80),
        (4096, 2.0, 64, 128, 128, 128),
        (2048, 1.25, 32, 80, 80, 80),
        (456, 1.25, 32, 17, 18, 20),
        (456, 2.0, 32, 28, 28, 32),
        (128, 1.25, 64, 4, 4, 4),
        (64, 64.0, 8, 64, 512, 512),
    ],
)
def test_capacities_of_three_code_bases(tokens, factor, experts, floor, rounded, ceiled):
    """mesh-tensorflow 0.1.21 takes the floor; flaxformer rounds, and does not cap at the group."""
    assert slots_of(factor, tokens, experts) == floor
    assert slots_of(factor, tokens, experts, rounding="round", cap=False) == rounded
    vmoe = {"convention": "assignments", "rounding": "ceil", "multiple": 4, "minimum": 1}
    assert slots_of(factor, tokens, experts, cap=False, **vmoe) == ceiled


def test_capacity_rounding_convention_and_bounds():
    assert slots_of(1.25, 456, 32, rounding="ceil") == 18
    # A half goes to the even neighbour: 2.5 to 2, 3.5 to 4.
    assert slots_of(0.5, 10, 2, rounding="round", minimum=1) == 2
    assert slots_of(0.5, 14, 2, rounding="round", minimum=1) == 4
    assert slots_of(1.0, 64, 8, top_k=2, convention="assignments") == 16
    assert slots_of(1.0, 64, 8, top_k=2) == 8
    assert slots_of(0.1, 64, 8) == 4
    assert slots_of(0.1, 64, 8, minimum=1) == 1
    assert slots_of(1.0, 3, 8) == 3
    # The factor is the number that is written: floats below 0.7 and above 1.1 stand for them.
    assert slots_of(0.7, 100, 10, minimum=1) == 7
    assert slots_of(1.1, 100, 10, minimum=1, rounding="ceil") == 11


# --- places


BOUND = {"slots": "capacity", "minimum": 1}
ONE = {**BOUND, "capacity_factor": 1.0}


SLOTS = {
    "ragged slots count up": ([[0, 1], [0, 2], [1, 0]], 3, {}, [[0, 1], [1, 0], [0, 2]]),
    # Capacity 1: token 0 wants expert 1 second, token 1 wants it first.
    "first choices come first": ([[0, 1], [1, 0]], 2, ONE, [[0, -1], [0, -1]]),
    "token by token": ([[0, 1], [1, 0]], 2, {**ONE, "order": "token"}, [[0, 0], [-1, -1]]),
    "groups are counted apart": ([[0]] * 4, 2, {"groups": 2}, [[0], [1], [0], [1]]),
    # Two tokens a group: one slot each.
    "groups have a capacity": ([[0]] * 4, 2, {**ONE, "groups": 2}, [[0], [-1], [0], [-1]]),
    "no expert": ([[-1], [0], [2], [0]], 2, {}, [[-1], [0], [-1], [1]]),
}


@pytest.mark.parametrize("case", SLOTS)
def test_slots_by_hand(case):
    choices, experts, attrs, slots = SLOTS[case]
    assert assign_slots(choices, experts, **attrs).tolist() == slots


@pytest.mark.parametrize(
    ("axes", "tokens", "slots"),
    [
        ("batch seq choice", ("batch", "seq"), [[[0], [1], [2]], [[3], [4], [5]]]),
        ("batch seq choice", ("seq", "batch"), [[[0], [2], [4]], [[1], [3], [5]]]),
        ("choice seq batch", ("batch", "seq"), [[[0, 3], [1, 4], [2, 5]]]),
    ],
)
def test_tokens_are_numbered_in_the_order_of_the_token_axes(axes, tokens, slots):
    choices = np.zeros(np.shape(slots), int), axes
    assert evaluate("assign_slots", choices, tokens=tokens, experts=1).tolist() == slots


@st.composite
def routings(draw, max_tokens=24):
    """Draw choices `[token, choice]` of distinct experts, and the number of experts."""
    experts = draw(st.integers(1, 6))
    top_k = draw(st.integers(1, min(3, experts)))
    tokens = draw(st.integers(1, max_tokens))
    seed = draw(st.integers(0, 2**32))
    scores = np.random.default_rng(seed).normal(size=(tokens, experts))
    return np.argsort(-scores, axis=1)[:, :top_k], experts


ORDERS = st.sampled_from(["choice", "token"])
FACTORS = st.sampled_from([0.25, 0.5, 1.0, 1.25, 2.0])


@given(routings(), FACTORS, ORDERS)
def test_a_slot_holds_one_token_and_the_lowest_are_filled(routing, factor, order):
    choices, experts = routing
    bound = slots_of(factor, len(choices), experts, choices.shape[1], minimum=1)
    found = assign_slots(choices, experts, capacity_factor=factor, order=order, **BOUND)
    for expert in range(experts):
        mine = sorted(found[(choices == expert) & (found >= 0)].tolist())
        wanted = int((choices == expert).sum())
        assert mine == list(range(min(bound, wanted)))


@given(routings(), st.integers(0, 23), st.integers(0, 2**32))
def test_filling_by_token_is_strictly_causal_and_first_choices_always_are(routing, cut, seed):
    choices, experts = routing
    assume(cut < len(choices))
    other = choices.copy()
    later = np.random.default_rng(seed).normal(size=(len(choices) - cut, experts))
    other[cut:] = np.argsort(-later, axis=1)[:, : choices.shape[1]]
    for order, ranks in (("token", slice(None)), ("choice", slice(1))):
        attrs = {"order": order, "capacity_factor": 0.75, **BOUND}
        before, after = (assign_slots(c, experts, **attrs) for c in (choices, other))
        assert_array_equal(before[:cut, ranks], after[:cut, ranks])


# --- dispatch and combine


def exchange(choices, experts, x, gates, **attrs):
    """Return what dispatch gives for `x` and what combine makes of it at once."""

    def build(b, x, e, g):
        p = b.assign_slots(e, tokens="token", experts=experts, **attrs)
        rows = b.dispatch(x, e, p)
        return {"p": p, "rows": rows, "y": b.combine(rows, e, p, g)}

    e, g = (choices, "token=T choice"), (gates, "token=T choice")
    return compute(build, x=(x, "token=T embed"), e=e, g=g)


@given(routings(), st.sampled_from([1, 2]), st.sampled_from(["ragged", "capacity"]), ORDERS)
def test_combine_undoes_dispatch_up_to_what_was_dropped(routing, groups, slots, order):
    choices, experts = routing
    assume(len(choices) % groups == 0)
    rng = np.random.default_rng(0)
    x, gates = rng.normal(size=(len(choices), 3)), rng.normal(size=choices.shape)
    bound = {"capacity_factor": 0.75, "minimum": 1} if slots == "capacity" else {}
    found = exchange(choices, experts, x, gates, groups=groups, slots=slots, order=order, **bound)
    kept = np.where(found["p"] >= 0, gates, 0.0).sum(1)
    assert_allclose(found["y"], kept[:, None] * x, rtol=1e-12, atol=1e-15)


def test_where_the_rows_lie():
    choices = [[1, 0], [1, 2], [2, 1], [0, 1]]
    x = np.arange(4.0)[:, None] + 1
    found = exchange(choices, 3, x, np.ones((4, 2)), groups=2)
    nan = np.nan
    expected = [[[1, nan], [1, 2], [2, nan]], [[4, nan], [3, 4], [3, nan]]]
    assert_array_equal(found["rows"][..., 0], expected)


def test_an_empty_slot_under_a_capacity_holds_zeros():
    ones = np.ones((3, 1))
    found = exchange([[0], [0], [0]], 2, ones, ones, capacity_factor=1.4, **BOUND)
    assert found["rows"].shape == (1, 2, 2, 1)
    assert_array_equal(found["rows"][0, :, :, 0], [[1, 1], [0, 0]])
    assert_array_equal(found["y"][:, 0], [1, 1, 0])
