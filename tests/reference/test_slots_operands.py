"""Slots under policies, priorities, masks and groups of a size; experts that choose tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from moecc.errors import InputError
from moecc.ir import F64, I32, PRED, Builder, Graph, tensor

from .evaluation import assign_slots, compute, evaluate

SEEDS = st.integers(0, 2**32 - 1)
ORDERS = st.sampled_from(["choice", "token"])
BOUND = {"slots": "capacity", "capacity_factor": 0.75, "minimum": 1}


def draw_choices(seed):
    """Return a generator, and two of four experts for each of twelve tokens."""
    rng = np.random.default_rng(seed)
    return rng, np.argsort(-rng.normal(size=(12, 4)), axis=1)[:, :2]


@given(SEEDS, ORDERS, st.booleans())
def test_what_is_not_kept_leaves_its_slot_to_others(seed, order, bounded):
    rng, choices = draw_choices(seed)
    keep = rng.random((12, 2)) < 0.6
    attrs = {"order": order, **(BOUND if bounded else {})}
    slots = assign_slots(choices, 4, keep=keep, **attrs)
    assert (slots[~keep] == -1).all()
    # A choice that names no expert is dropped too, so the two say the same.
    assert_array_equal(slots, assign_slots(np.where(keep, choices, -1), 4, **attrs))


@given(SEEDS, ORDERS)
def test_padding_gets_no_slot_and_takes_none_away(seed, order):
    rng, choices = draw_choices(seed)
    mask = rng.random(12) < 0.6
    attrs = {"order": order, **BOUND}
    slots = assign_slots(choices, 4, mask=mask, **attrs)
    assert (slots[~mask] == -1).all()
    keep = np.repeat(mask[:, None], 2, 1)
    assert_array_equal(slots, assign_slots(choices, 4, keep=keep, **attrs))


@given(SEEDS, ORDERS, st.sampled_from([1, 2]))
def test_priority_sorts_places_and_puts_back(seed, order, groups):
    """V-MoE's algorithm: sort the tokens of each group, place them, undo the sorting."""
    rng, choices = draw_choices(seed)
    priority = rng.integers(0, 5, 12) / 4
    attrs = {"order": order, "groups": groups, **BOUND}
    slots = assign_slots(choices, 4, priority=priority, **attrs)
    size = 12 // groups
    turns = np.concatenate(
        [g * size + np.argsort(-priority[g * size :][:size], kind="stable") for g in range(groups)]
    )
    expected = np.empty_like(slots)
    expected[turns] = assign_slots(choices[turns], 4, **attrs)
    assert_array_equal(slots, expected)


@given(SEEDS, st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_groups_by_size_are_groups_by_number(seed, size):
    _, choices = draw_choices(seed)
    by_size = assign_slots(choices, 4, group_size=size, **BOUND)
    assert_array_equal(by_size, assign_slots(choices, 4, groups=12 // size, **BOUND))


def exchange_in_fours(tokens):
    """Return rows of tokens, and what groups of four make of them."""
    data = np.arange(2.0 * tokens).reshape(tokens, 2)

    def build(b, e, x):
        slots = b.assign_slots(
            e, tokens="token", experts=2, group_size=4, slots="capacity", capacity_factor=1.0
        )
        rows = b.dispatch(x, e, slots)
        shape = "group=groups(%slots), expert=2, slot=capacity(%slots), embed=2"
        assert str(rows.type) == f"f64[{shape}]"
        ones = b.broadcast(b.constant(value=1.0, dtype="f64"), e)
        return {"rows": rows, "y": b.combine(rows, e, slots, ones), "sums": b.group_sum(x, slots)}

    choices = np.zeros((tokens, 1), int), "token=T choice"
    return data, compute(build, e=choices, x=(data, "token=T embed"))


def test_the_number_of_groups_of_a_size_is_known_at_run_time():
    data, found = exchange_in_fours(12)
    assert found["rows"].shape == (3, 2, 4, 2)
    assert_array_equal(found["y"], data)
    assert_array_equal(found["sums"], data.reshape(3, 4, 2).sum(1))
    with pytest.raises(InputError, match="do not divide"):
        exchange_in_fours(10)


# --- policies


def kept(*arrays, **attrs):
    """Return which choices gates, and uniform numbers beside them, keep."""
    return evaluate("keep_choices", *((a, "token=T choice") for a in arrays), **attrs)


def test_policies():
    gates = [[0.7, 0.3], [0.8, 0.2], [0.95, 0.05]]
    assert kept(gates, policy="all").all()
    assert kept(gates, policy="none").tolist() == [[True, False]] * 3
    assert kept(gates, policy="threshold")[:, 1].tolist() == [True, False, False]
    assert kept(gates, policy="threshold", threshold=0.0).all()
    uniform = [[0.99, 0.99], [0.99, 0.99], [0.99, 0.24]]
    assert kept(gates, uniform)[:, 1].tolist() == [True, True, True]
    assert kept(gates, [[0, 0.0], [0, 0.0], [0, 0.26]])[:, 1].tolist() == [True, True, False]
    assert kept([[0.0, 0.5]], [[0.9, 0.9]], threshold=0.0).all()


# --- experts choose


def choose(scores, *masks, **attrs):
    """Return the experts, gates and slots where experts choose tokens, under a mask or none."""
    operands = (scores, "token=T expert"), *((mask, "token=T") for mask in masks)
    attrs |= {"tokens": "token", "experts": scores.shape[1], "using": ("mask",) * len(masks)}
    return evaluate("expert_choice", *operands, minimum=1, **attrs)


@given(SEEDS, st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([1, 2, 3]))
def test_an_expert_takes_its_best_tokens_in_every_group(seed, factor, groups):
    scores = np.random.default_rng(seed).normal(size=(12, 4))
    experts, gates, places = choose(scores, capacity_factor=factor, groups=groups)
    size = 12 // groups
    limit = min(size, max(1, int(factor * size / 4)))
    assert_array_equal(gates, scores)
    assert_array_equal(experts, np.tile(np.arange(4), (12, 1)))
    for group, expert in np.ndindex(groups, 4):
        part = slice(group * size, (group + 1) * size)
        best = np.argsort(-scores[part, expert])[:limit]
        slots = places[part, expert]
        assert slots[best].tolist() == list(range(limit))
        assert (slots >= 0).sum() == limit


def test_experts_take_no_padding_even_where_slots_are_left():
    scores = np.random.default_rng(0).normal(size=(6, 2))
    mask = np.array([True, False, False, True, False, False])
    _, _, slots = choose(scores, mask, capacity_factor=1.0)
    assert (slots[~mask] == -1).all()
    assert np.sort(slots[mask], axis=0).tolist() == [[0, 0], [1, 1]]


def test_rows_of_chosen_tokens_come_back_weighted():
    def build(b, s, x):
        experts, gates, slots = b.expert_choice(
            s, tokens="token", experts=3, capacity_factor=1.0, minimum=1
        )
        y = b.combine(b.dispatch(x, experts, slots), experts, slots, gates)
        return {"slots": slots, "y": y}

    rng = np.random.default_rng(2)
    scores, data = rng.normal(size=(9, 3)), rng.normal(size=(9, 2))
    found = compute(build, s=(scores, "token=T expert"), x=(data, "token=T embed"))
    weight = np.where(found["slots"] >= 0, scores, 0).sum(1)
    assert_allclose(found["y"], weight[:, None] * data, rtol=1e-12)


# --- hashes, and a bias for choosing


def test_hashes_are_even_and_seeds_differ():
    ids = np.arange(32000), "token=T"
    hashes = [evaluate("hash_experts", ids, experts=8, top_k=2, seed=seed) for seed in (0, 1)]
    for first, second in (experts.T for experts in hashes):
        counts = np.bincount(first, minlength=8)
        # χ² with 7 degrees of freedom is below 24.3 but once in a thousand hashes.
        assert ((counts - 4000) ** 2 / 4000).sum() < 24.3
        assert_array_equal(second, (first + 1) % 8)
    assert (hashes[0] == hashes[1])[:, 0].mean() == pytest.approx(1 / 8, abs=0.02)


@given(SEEDS, st.sampled_from(["sigmoid", "sigmoid-renormalised", "softmax", "renormalised"]))
def test_a_bias_chooses_and_does_not_weigh(seed, gates):
    rng = np.random.default_rng(seed)
    logits, bias = rng.normal(size=(10, 6)), rng.normal(size=6)
    operands = (logits, "token=T expert"), (bias, "expert")
    experts, weights = evaluate("route", *operands, top_k=3, gates=gates, using="bias")
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = 1 / (1 + np.exp(-logits)) if gates.startswith("sigmoid") else softmax
    assert_array_equal(experts, np.argsort(-(scores + bias), axis=1)[:, :3])
    expected = np.take_along_axis(scores, experts, 1)
    if gates.endswith("renormalised"):
        expected = expected / expected.sum(1, keepdims=True)
    assert_allclose(weights, expected, rtol=1e-12)


# --- what is refused

OPERANDS = {
    "e": tensor(I32, token="T", choice=2),
    "g": tensor(F64, token="T", choice=2),
    "s": tensor(F64, token="T", expert=4),
    "keep": tensor(PRED, token="T", choice=2),
    "mask": tensor(PRED, token="T"),
}
PLACED = {"tokens": "token", "experts": 4}


@pytest.mark.parametrize(
    ("line", "attrs", "message"),
    [
        ("assign_slots e keep", PLACED, "its word"),
        ("assign_slots e keep", {**PLACED, "using": "kept"}, "'using' of assign_slots is wrong"),
        ("assign_slots e g", {**PLACED, "using": "keep"}, "bool elements"),
        ("assign_slots e g", {**PLACED, "using": "priority"}, "one element per token"),
        ("assign_slots e", {**PLACED, "multiple": 0}, "multiple must be at least 1"),
        ("expert_choice s", {**PLACED, "experts": 3, "capacity_factor": 1.0}, "two sizes"),
        ("hash_experts e", {"experts": 2, "top_k": 3, "choice": "c"}, "top_k"),
        ("route s mask", {"top_k": 1, "using": "bias"}, "floating-point"),
    ],
)
def test_what_does_not_fit_is_refused(line, attrs, message):
    graph = Graph()
    op, *names = line.split()
    operands = [graph.input(name, OPERANDS[name]) for name in names]
    with pytest.raises(InputError, match=message):
        Builder(graph).node(op, *operands, **attrs)
