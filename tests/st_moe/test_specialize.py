"""The modes of a model: what training and evaluation see, and that either can be had again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moecc_passes.cleanup import CanonicalizePass
from moecc_passes.specialize import ModeConfig, SpecializePass, recorded
from tiers import examples

from moecc.errors import InputError
from moecc.ir import F64, Builder, Graph, clone, equal, parse, print_graph, tensor
from moecc.ir.moe import emit_expert_choice, emit_routing
from moecc.rewrite.passes import Context
from moecc.testing import laws, params_for, run_reference

EMBED, MLP = 4, 6


def model(experts=4, top_k=2, *, layers=2, causal=False, **routing):
    """Return layers of experts with residuals; `causal` puts attention under a mask before."""
    graph = Graph("sparse")
    b = Builder(graph)
    x = graph.input("x", tensor(F64, batch="B", seq="S", embed=EMBED))
    for layer in range(layers):
        with b.at(f"layers.{layer}.ffn"):
            if causal:
                x = b.add(x, attention(b, x))
            names = ("router", "up", "down")
            shapes = ({"embed": EMBED}, {"mlp": MLP, "embed": EMBED}, {"embed": EMBED, "mlp": MLP})
            w = {
                n: graph.param(f"{n}{layer}", tensor(F64, expert=experts, **s))
                for n, s in zip(names, shapes, strict=True)
            }
            rows, finish = emit_routing(b, x, w["router"], experts=experts, top_k=top_k, **routing)
            hidden = b.silu(b.contract(rows, w["up"], over="embed"))
            x = b.add(x, finish(b.contract(hidden, w["down"], over="mlp")))
    graph.set_output("y", x)
    return graph


def attention(b, x):
    """Attend from every token to itself and those before it."""
    keys = b.rename(x, axis="seq", to="kv_seq")
    here = b.positions(x, axis="seq")
    seen = b.causal(here, b.rename(here, axis="seq", to="kv_seq"))
    scores = b.mask(b.contract(x, keys, over="embed"), seen)
    return b.contract(b.softmax(scores, axis="kv_seq"), keys, over="kv_seq")


def specialised(graph, **options):
    """Return a copy of `graph` after the pass, which must be well-formed and its own text."""
    item = SpecializePass(**options)
    assert item.validate() == []
    after = clone(graph)
    item.apply(after, Context())
    laws.check_graph(after)
    return after


def traced(graph, inputs, seed=0):
    """Return the output and the slots, gates and what is kept of every layer."""
    seen = clone(graph)
    for node in list(seen):
        if node.op.name in ("assign_slots", "route", "keep_choices", "combine"):
            for value in node.results:
                seen.set_output(value.name, value)
    return run_reference(seen, inputs=inputs, seed=seed)


def tokens(count=16, seed=0):
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(2, count // 2, EMBED)), "key": np.uint64(rng.integers(2**63))}


def given_inputs(graph, inputs):
    return {n: inputs[n] for n in graph.inputs}


# --- one option at a time


def test_capacities_per_mode():
    graph = model()
    bounded = specialised(graph, capacity_factor=1.25, minimum=1)
    places = [n for n in bounded if n.op.name == "assign_slots"]
    assert [n.attrs["slots"] for n in places] == ["capacity"] * 2
    found = traced(bounded, given_inputs(bounded, tokens()))
    # ⌊1.25 · 16 / 4⌋ slots an expert, 20 of 32 choices at most.
    for place in places:
        assert (found[place.results[0].name] >= 0).sum() <= 20
        assert found[place.results[0].name].max() == 4
    again = specialised(bounded, mode="eval", dropless=True)
    graph.attrs["mode"] = "eval"
    for node in graph:
        if node.op.name == "assign_slots":
            node.attrs["minimum"] = 1
    assert equal(again, graph)


@given(
    st.sampled_from(["none", "threshold", "random"]),
    st.sampled_from([0.2, 0.45]),
    st.sampled_from(["renormalised", "softmax", "sigmoid"]),
)
def test_policies_see_renormalised_gates(policy, threshold, gates):
    graph = specialised(
        model(gates=gates, scale=2.0, layers=1), policy=policy, threshold=threshold
        if policy != "none" else None
    )  # fmt: skip
    found = traced(graph, given_inputs(graph, tokens()))
    share = found["gates"] / found["gates"].sum(-1, keepdims=True)
    keep, slots = found["keep"], found["slots"]
    np.testing.assert_array_equal(keep, slots >= 0)
    assert keep[..., 0].all()
    second = share[..., 1]
    if policy == "none":
        assert not keep[..., 1].any()
    if policy == "threshold":
        np.testing.assert_array_equal(keep[..., 1], second > threshold)
    if policy == "random":
        assert keep[..., 1][second >= threshold].all()


@pytest.mark.parametrize(
    ("options", "changes_choice"),
    [
        ({"jitter": 0.5}, True),
        ({"router_noise": 1.0}, True),
        ({"input_dropout": 0.5}, True),
        ({"expert_dropout": 0.5, "capacity_factor": 4.0}, False),
    ],
)
def test_noise_of_training(options, changes_choice):
    graph = model()
    noisy = specialised(graph, **options)
    inputs, other = tokens(), {**tokens(), "key": np.uint64(1)}
    first, again, second = (traced(noisy, given_inputs(noisy, i)) for i in (inputs, inputs, other))
    plain = traced(graph, given_inputs(graph, inputs))
    np.testing.assert_array_equal(first["y"], again["y"])
    for one, two in ((first, second), (first, plain)):
        assert (one["y"] != two["y"]).any()
        assert (one["experts"] != two["experts"]).any() == changes_choice
    # Two layers have keys of their own.
    uniform = [n.results[0] for n in noisy if n.op.name.startswith("random_")]
    for value in uniform:
        noisy.set_output(value.name, value)
    drawn = run_reference(noisy, inputs=given_inputs(noisy, inputs))
    one, two = (drawn[v.name] for v in uniform)
    assert (one != two).mean() > 0.99
    equal_back = specialised(noisy_without_outputs(noisy), mode="eval")
    assert "key" not in equal_back.inputs


def noisy_without_outputs(graph):
    for name in [n for n in graph.output_names if n != "y"]:
        graph.drop_output(name)
    return graph


def test_priority_is_the_probability_of_the_first_choice():
    graph = specialised(
        model(layers=1), capacity_factor=0.5, minimum=1, priority=True, policy="none"
    )
    (place,) = (n for n in graph if n.op.name == "assign_slots")
    assert place.attrs["using"] == ("keep", "priority")
    found = traced(graph, given_inputs(graph, tokens()))
    logits = tokens()["x"].reshape(-1, EMBED) @ params(graph)["router0"].T
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    slots = found["slots"].reshape(-1, 2)[:, 0]
    for expert in range(4):
        mine = p.argmax(1) == expert
        kept, lost = p.max(1)[mine & (slots >= 0)], p.max(1)[mine & (slots < 0)]
        assert not lost.size or kept.min() > lost.max()


def params(graph):
    return params_for(graph, 0)


# --- back and forth


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "capacity_factor": st.sampled_from([0.5, 1.25, 4.0]),
        "policy": st.sampled_from(["all", "none", "threshold", "random"]),
        "priority": st.just(True),
        "after_drop": st.sampled_from(["keep", "rescale"]),
        "jitter": st.just(0.1),
        "router_noise": st.just(0.5),
        "input_dropout": st.just(0.1),
        "group_size": st.just(2),
        "order": st.just("token"),
    },
)


@settings(max_examples=examples(25, 100))
@given(OPTIONS, OPTIONS, st.booleans())
def test_a_mode_does_not_depend_on_the_one_before(first, second, tidy):
    """Except for attributes of slots, which stay as they are where nothing is said."""
    assignment = {"capacity_factor": 1.0, "order": "choice", "groups": 1}
    second = {**assignment, **second}
    if "group_size" in second:
        del second["groups"]
    graph = model()
    through = specialised(graph, **first)
    if tidy:
        CanonicalizePass().apply(through, Context())
    directly = specialised(graph, **second)
    after = specialised(through, **second)
    if tidy:
        for one in (directly, after):
            CanonicalizePass().apply(one, Context())
    assert equal(after, directly)
    assert equal(specialised(directly, **second), directly) or tidy


@settings(max_examples=examples(25, 100))
@given(OPTIONS)
def test_specialised_graphs_obey_the_laws_of_passes(options):
    item = SpecializePass(**options)
    laws.check_changed_flag(item, model())
    laws.check_idempotent(item, model())


def test_settings_of_a_graph_are_used_and_options_win():
    graph = model()
    graph.attrs["routing"] = {
        "train": ModeConfig(capacity_factor=1.25, policy="random").settings(),
        "eval": ModeConfig(capacity_factor=2.0, policy="all").settings(),
    }
    graph = parse(print_graph(graph))
    assert recorded(graph, "train") == ModeConfig(capacity_factor=1.25, policy="random")
    assert recorded(graph, "serve") == ModeConfig()
    factors = {
        mode: [
            n.attrs["capacity_factor"]
            for n in specialised(graph, mode=mode)
            if "capacity_factor" in n.attrs
        ]
        for mode in ("train", "eval")
    }
    assert factors == {"train": [1.25] * 2, "eval": [2.0] * 2}
    assert "key" in specialised(graph, mode="train").inputs
    assert "key" not in specialised(graph, mode="eval").inputs
    other = specialised(graph, mode="eval", capacity_factor=3.0)
    assert [n.attrs["capacity_factor"] for n in other if n.op.name == "assign_slots"] == [3.0] * 2


# --- raising the capacity, and causality


def test_what_looks_ahead_is_refused_in_a_decoder_unless_forced():
    with pytest.raises(InputError, match="batch-prioritised routing in a decoder"):
        SpecializePass(priority=True).apply(model(causal=True), Context())
    forced = SpecializePass(priority=True, force=True)
    assert forced.apply(model(causal=True), Context()).matched == 2
    graph = Graph()
    b = Builder(graph, loc="layers.0.ffn")
    x = graph.input("x", tensor(F64, batch="B", seq="S", embed=EMBED))
    x = b.add(x, attention(b, x))
    w = graph.param("w", tensor(F64, expert=4, embed=EMBED))
    e, g, p = emit_expert_choice(b, x, w, tokens=("batch", "seq"), capacity_factor=1.0)
    graph.set_output("y", b.combine(b.dispatch(x, e, p), e, p, g))
    with pytest.raises(InputError, match="expert choice in a decoder"):
        SpecializePass().apply(clone(graph), Context())
    result = SpecializePass(force=True, capacity_factor=2.0).apply(graph, Context())
    assert result.matched == 1
    (node,) = (n for n in graph if n.op.name == "expert_choice")
    assert node.attrs["capacity_factor"] == 2.0
