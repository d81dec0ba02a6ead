"""Slots under policies, priorities, masks and groups of a size; experts that choose tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecc.errors import InputError
from moecc.ir import F64, I32, PRED, Builder, Graph, equal, parse, print_graph, tensor
from moecc.testing import run_reference

SEEDS = st.integers(0, 2**32 - 1)


def placed(choices, experts, more=None, **attrs):
    """Return the slots of `choices`, `[token, choice]`, given `more`."""
    graph, more = Graph(), more or {}
    e = graph.input("e", tensor(I32, token="T", choice=choices.shape[1]))
    types = {
        "keep": tensor(PRED, token="T", choice=choices.shape[1]),
        "priority": tensor(F64, token="T"),
        "mask": tensor(PRED, token="T"),
    }
    operands = [graph.input(name, types[name]) for name in more]
    p = Builder(graph).assign_slots(
        e, *operands, tokens="token", experts=experts, using=tuple(more), **attrs
    )
    graph.set_output("p", p)
    assert equal(parse(print_graph(graph)), graph)
    return run_reference(graph, inputs={"e": choices, **more})["p"]


def choices_of(rng, tokens, experts, top_k):
    return np.argsort(-rng.normal(size=(tokens, experts)), axis=1)[:, :top_k]


BOUND = {"slots": "capacity", "capacity_factor": 0.75, "minimum": 1}


@given(SEEDS, st.sampled_from(["choice", "token"]), st.booleans())
def test_what_is_not_kept_leaves_its_slot_to_others(seed, order, bounded):
    rng = np.random.default_rng(seed)
    choices, keep = choices_of(rng, 12, 4, 2), rng.random((12, 2)) < 0.6
    attrs = {"order": order, **(BOUND if bounded else {})}
    found = placed(choices, 4, {"keep": keep}, **attrs)
    assert (found[~keep] == -1).all()
    # A choice that names no expert is dropped too, so the two say the same.
    np.testing.assert_array_equal(found, placed(np.where(keep, choices, -1), 4, **attrs))


@given(SEEDS, st.sampled_from(["choice", "token"]))
def test_padding_gets_no_slot_and_takes_none_away(seed, order):
    rng = np.random.default_rng(seed)
    choices, mask = choices_of(rng, 12, 4, 2), rng.random(12) < 0.6
    found = placed(choices, 4, {"mask": mask}, order=order, **BOUND)
    assert (found[~mask] == -1).all()
    keep = np.repeat(mask[:, None], 2, 1)
    np.testing.assert_array_equal(found, placed(choices, 4, {"keep": keep}, order=order, **BOUND))


@given(SEEDS, st.sampled_from(["choice", "token"]), st.sampled_from([1, 2]))
def test_priority_sorts_places_and_puts_back(seed, order, groups):
    """V-MoE's algorithm: sort the tokens of each group, place them, undo the sorting."""
    rng = np.random.default_rng(seed)
    choices, priority = choices_of(rng, 12, 4, 2), rng.integers(0, 5, 12) / 4
    attrs = {"order": order, "groups": groups, **BOUND}
    found = placed(choices, 4, {"priority": priority}, **attrs)
    size = 12 // groups
    turns = np.concatenate(
        [g * size + np.argsort(-priority[g * size :][:size], kind="stable") for g in range(groups)]
    )
    expected = np.empty_like(found)
    expected[turns] = placed(choices[turns], 4, **attrs)
    np.testing.assert_array_equal(found, expected)


@given(SEEDS, st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_groups_by_size_are_groups_by_number(seed, size):
    choices = choices_of(np.random.default_rng(seed), 12, 4, 2)
    by_size = placed(choices, 4, group_size=size, **BOUND)
    np.testing.assert_array_equal(by_size, placed(choices, 4, groups=12 // size, **BOUND))


def test_the_number_of_groups_of_a_size_is_known_at_run_time():
    graph = Graph()
    b = Builder(graph)
    e = graph.input("e", tensor(I32, token="T", choice=1))
    x = graph.input("x", tensor(F64, token="T", embed=2))
    slots = b.assign_slots(
        e, tokens="token", experts=2, group_size=4, slots="capacity", capacity_factor=1.0
    )
    rows = b.dispatch(x, e, slots)
    graph.set_output(
        "y", b.combine(rows, e, slots, b.broadcast(b.constant(value=1.0, dtype="f64"), e))
    )
    graph.set_output("sums", b.group_sum(x, slots))
    graph.set_output("rows", rows)
    assert str(rows.type) == "f64[group=groups(%slots), expert=2, slot=capacity(%slots), embed=2]"
    assert equal(parse(print_graph(graph)), graph)
    data = np.arange(24.0).reshape(12, 2)
    found = run_reference(graph, inputs={"e": np.zeros((12, 1), int), "x": data})
    assert found["rows"].shape == (3, 2, 4, 2)
    np.testing.assert_array_equal(found["y"], data)
    np.testing.assert_array_equal(found["sums"], data.reshape(3, 4, 2).sum(1))
    with pytest.raises(InputError, match="do not divide"):
        run_reference(graph, inputs={"e": np.zeros((10, 1), int), "x": data[:10]})


# --- policies


def kept(gates, uniform=None, **attrs):
    graph = Graph()
    gates = np.asarray(gates, float)
    operands = [graph.input("g", tensor(F64, token="T", choice=gates.shape[1]))]
    arrays = {"g": gates}
    if uniform is not None:
        operands.append(graph.input("u", operands[0].type))
        arrays["u"] = np.asarray(uniform, float)
    graph.set_output("k", Builder(graph).keep_choices(*operands, **attrs))
    return run_reference(graph, inputs=arrays)["k"]


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


def chosen(scores, factor, mask=None, **attrs):
    graph = Graph()
    b = Builder(graph)
    s = graph.input("s", tensor(F64, token="T", expert=scores.shape[1]))
    masks = [] if mask is None else [graph.input("mask", tensor(PRED, token="T"))]
    attrs = {"minimum": 1, "using": ("mask",) if masks else (), **attrs}
    results = b.expert_choice(
        s, *masks, tokens="token", experts=scores.shape[1], capacity_factor=factor, **attrs
    )
    for name, value in zip(("experts", "gates", "assign_slots"), results, strict=True):
        graph.set_output(name, value)
    assert equal(parse(print_graph(graph)), graph)
    arrays = {"s": scores} if mask is None else {"s": scores, "mask": mask}
    return run_reference(graph, inputs=arrays)


@given(SEEDS, st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([1, 2, 3]))
def test_an_expert_takes_its_best_tokens_in_every_group(seed, factor, groups):
    scores = np.random.default_rng(seed).normal(size=(12, 4))
    found = chosen(scores, factor, groups=groups)
    size = 12 // groups
    limit = min(size, max(1, int(factor * size / 4)))
    np.testing.assert_array_equal(found["gates"], scores)
    np.testing.assert_array_equal(found["experts"], np.tile(np.arange(4), (12, 1)))
    for group, expert in np.ndindex(groups, 4):
        part = slice(group * size, (group + 1) * size)
        best = np.argsort(-scores[part, expert])[:limit]
        slots = found["assign_slots"][part, expert]
        assert slots[best].tolist() == list(range(limit))
        assert (slots >= 0).sum() == limit


def test_experts_take_no_padding_even_where_slots_are_left():
    scores = np.random.default_rng(0).normal(size=(6, 2))
    mask = np.array([True, False, False, True, False, False])
    found = chosen(scores, 1.0, mask)
    assert (found["assign_slots"][~mask] == -1).all()
    assert np.sort(found["assign_slots"][mask], axis=0).tolist() == [[0, 0], [1, 1]]


def test_rows_of_chosen_tokens_come_back_weighted():
    rng = np.random.default_rng(2)
    graph = Graph()
    b = Builder(graph)
    s = graph.input("s", tensor(F64, token="T", expert=3))
    x = graph.input("x", tensor(F64, token="T", embed=2))
    experts, gates, slots = b.expert_choice(
        s, tokens="token", experts=3, capacity_factor=1.0, minimum=1
    )
    graph.set_output("p", slots)
    graph.set_output("y", b.combine(b.dispatch(x, experts, slots), experts, slots, gates))
    scores, data = rng.normal(size=(9, 3)), rng.normal(size=(9, 2))
    found = run_reference(graph, inputs={"s": scores, "x": data})
    weight = np.where(found["p"] >= 0, scores, 0).sum(1)
    np.testing.assert_allclose(found["y"], weight[:, None] * data, rtol=1e-12)


# --- hashes, and a bias for choosing


def test_hashes_are_even_and_seeds_differ():
    graph = Graph()
    ids = graph.input("ids", tensor(I32, token="T"))
    b = Builder(graph)
    for seed in (0, 1):
        graph.set_output(f"h{seed}", b.hash_experts(ids, experts=8, top_k=2, seed=seed))
    found = run_reference(graph, inputs={"ids": np.arange(32000)})
    for seed in (0, 1):
        first, second = found[f"h{seed}"].T
        counts = np.bincount(first, minlength=8)
        # χ² with 7 degrees of freedom is below 24.3 but once in a thousand hashes.
        assert ((counts - 4000) ** 2 / 4000).sum() < 24.3
        np.testing.assert_array_equal(second, (first + 1) % 8)
    assert (found["h0"][:, 0] == found["h1"][:, 0]).mean() == pytest.approx(1 / 8, abs=0.02)


@given(SEEDS, st.sampled_from(["sigmoid", "sigmoid-renormalised", "softmax", "renormalised"]))
def test_a_bias_chooses_and_does_not_weigh(seed, gates):
    rng = np.random.default_rng(seed)
    logits, bias = rng.normal(size=(10, 6)), rng.normal(size=6)
    graph = Graph()
    b = Builder(graph)
    x = graph.input("l", tensor(F64, token="T", expert=6))
    e, g = b.route(x, graph.input("b", tensor(F64, expert=6)), top_k=3, gates=gates, using="bias")
    graph.set_output("e", e)
    graph.set_output("g", g)
    found = run_reference(graph, inputs={"l": logits, "b": bias})
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = 1 / (1 + np.exp(-logits)) if gates.startswith("sigmoid") else softmax
    expected = np.argsort(-(scores + bias), axis=1)[:, :3]
    np.testing.assert_array_equal(found["e"], expected)
    weights = np.take_along_axis(scores, expected, 1)
    if gates.endswith("renormalised"):
        weights = weights / weights.sum(1, keepdims=True)
    np.testing.assert_allclose(found["g"], weights, rtol=1e-12)


# --- what is refused


def build(make):
    graph = Graph()
    b = Builder(graph)
    types = {
        "e": tensor(I32, token="T", choice=2),
        "g": tensor(F64, token="T", choice=2),
        "s": tensor(F64, token="T", expert=4),
        "keep": tensor(PRED, token="T", choice=2),
        "wide": tensor(PRED, token="T", choice=3),
        "mask": tensor(PRED, token="T"),
        "bias": tensor(F64, expert=4),
    }
    make(b, **{n: graph.input(n, t) for n, t in types.items()})


REFUSED = {
    "operand": (
        lambda b, e, keep, **_: b.assign_slots(e, keep, tokens="token", experts=4),
        "its word",
    ),
    "unknown": (
        lambda b, e, keep, **_: b.assign_slots(e, keep, tokens="token", experts=4, using="kept"),
        "'using' of assign_slots is wrong",
    ),
    "float": (
        lambda b, e, g, **_: b.assign_slots(e, g, tokens="token", experts=4, using="keep"),
        "bool elements",
    ),
    "priority": (
        lambda b, e, g, **_: b.assign_slots(e, g, tokens="token", experts=4, using="priority"),
        "one element per token",
    ),
    "multiple": (
        lambda b, e, **_: b.assign_slots(e, tokens="token", experts=4, multiple=0),
        "multiple must be at least 1",
    ),
    "uniform": (lambda b, g, **_: b.keep_choices(g), "uniform numbers"),
    "experts": (
        lambda b, s, **_: b.expert_choice(s, tokens="token", experts=3, capacity_factor=1.0),
        "two sizes",
    ),
    "hashes": (lambda b, mask, e, **_: b.hash_experts(e, experts=2, top_k=3, choice="c"), "top_k"),
    "no score": (
        lambda b, s, bias, **_: b.route(s, bias, top_k=1, gates="ones", using="bias"),
        "no score",
    ),
    "bias": (lambda b, s, mask, **_: b.route(s, mask, top_k=1, using="bias"), "floating-point"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    make, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        build(make)
