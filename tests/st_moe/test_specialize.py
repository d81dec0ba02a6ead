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
from tests.passes.dense_blocks import applied

from .layers import EMBED, MLP, TOKENS, attend, nodes, normal, softmax


def model(*, layers=2, causal=False, **routing):
    """Return layers of experts with residuals; `causal` puts attention under a mask before."""
    graph = Graph("sparse")
    b = Builder(graph)
    x = graph.input("x", tensor(F64, batch="B", seq="S", embed=EMBED))
    for layer in range(layers):
        with b.at(f"layers.{layer}.ffn"):
            if causal:
                x = b.add(x, attend(b, x, x, x, over="embed"))
            router, up, down = (
                graph.param(f"{name}{layer}", tensor(F64, expert=4, **sizes))
                for name, sizes in (
                    ("router", {"embed": EMBED}),
                    ("up", {"mlp": MLP, "embed": EMBED}),
                    ("down", {"embed": EMBED, "mlp": MLP}),
                )
            )
            rows, finish = emit_routing(b, x, router, experts=4, top_k=2, **routing)
            hidden = b.silu(b.contract(rows, up, over="embed"))
            x = b.add(x, finish(b.contract(hidden, down, over="mlp")))
    graph.set_output("y", x)
    return graph


def specialised(graph, **options):
    """Return a copy of `graph` after the pass, which must be well-formed and its own text."""
    return applied(SpecializePass(**options), graph)[0]


X = normal(0, 2, 8, EMBED)


def traced(graph, key=0):
    """Return the output for `X`, and of every layer the slots, gates, what is kept and drawn."""
    seen = clone(graph)
    for node in [*seen]:
        if node.op.name in ("assign_slots", "route", "keep_choices") or is_drawn(node):
            for value in node.results:
                seen.set_output(value.name, value)
    inputs = {"x": X, "key": np.uint64(key)}
    return run_reference(seen, inputs={name: inputs[name] for name in seen.inputs})


def is_drawn(node):
    return node.op.name.startswith("random_")


def places(graph):
    """Return the nodes that assign slots."""
    return nodes(graph, "assign_slots")


# --- one option at a time


def test_capacities_per_mode():
    graph = model()
    bounded = specialised(graph, capacity_factor=1.25, minimum=1)
    assert [n.attrs["slots"] for n in places(bounded)] == ["capacity"] * 2
    found = traced(bounded)
    # ⌊1.25 · 16 / 4⌋ slots an expert, 20 of 32 choices at most.
    for place in places(bounded):
        slots = found[place.result.name]
        assert (slots >= 0).sum() <= 20
        assert slots.max() == 4
    again = specialised(bounded, mode="eval", dropless=True)
    graph.attrs["mode"] = "eval"
    for place in places(graph):
        place.attrs["minimum"] = 1
    assert equal(again, graph)


@given(
    st.sampled_from(["none", "threshold", "random"]),
    st.sampled_from([0.2, 0.45]),
    st.sampled_from(["renormalised", "softmax", "sigmoid"]),
)
def test_policies_see_renormalised_gates(policy, threshold, gates):
    options = {} if policy == "none" else {"threshold": threshold}
    graph = specialised(model(gates=gates, scale=2.0, layers=1), policy=policy, **options)
    found = traced(graph)
    keep, second = found["keep"], found["gates"][..., 1] / found["gates"].sum(-1)
    np.testing.assert_array_equal(keep, found["slots"] >= 0)
    assert keep[..., 0].all()
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
    first, again, second = (traced(noisy, key) for key in (2, 2, 1))
    np.testing.assert_array_equal(first["y"], again["y"])
    for other in (second, traced(graph)):
        assert (first["y"] != other["y"]).any()
        assert (first["experts"] != other["experts"]).any() == changes_choice
    # Two layers have keys of their own.
    numbers, others = (first[node.result.name] for node in noisy if is_drawn(node))
    assert (numbers != others).mean() > 0.99
    assert "key" not in specialised(noisy, mode="eval").inputs


def test_priority_is_the_probability_of_the_first_choice():
    graph = specialised(
        model(layers=1), capacity_factor=0.5, minimum=1, priority=True, policy="none"
    )
    (place,) = places(graph)
    assert place.attrs["using"] == ("keep", "priority")
    p = softmax(X.reshape(-1, EMBED) @ params_for(graph, 0)["router0"].T)
    has_slot = traced(graph)["slots"].reshape(-1, 2)[:, 0] >= 0
    for expert in range(4):
        mine = p.argmax(1) == expert
        kept, lost = p.max(1)[mine & has_slot], p.max(1)[mine & ~has_slot]
        assert not lost.size or kept.min() > lost.max()


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
    groups = {} if "group_size" in second else {"groups": 1}
    second = {"capacity_factor": 1.0, "order": "choice", **groups, **second}
    graph = model()
    through = specialised(graph, **first)
    if tidy:
        CanonicalizePass().apply(through, Context())
    directly = specialised(graph, **second)
    after = specialised(through, **second)
    if tidy:
        for mode in (directly, after):
            CanonicalizePass().apply(mode, Context())
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
    for options, factor in (
        ({"mode": "train"}, 1.25),
        ({"mode": "eval"}, 2.0),
        ({"mode": "eval", "capacity_factor": 3.0}, 3.0),
    ):
        after = specialised(graph, **options)
        assert [n.attrs["capacity_factor"] for n in places(after)] == [factor] * 2
        assert ("key" in after.inputs) == (options["mode"] == "train")


# --- raising the capacity, and causality


def test_what_looks_ahead_is_refused_in_a_decoder_unless_forced():
    with pytest.raises(InputError, match="batch-prioritised routing in a decoder"):
        SpecializePass(priority=True).apply(model(causal=True), Context())
    forced = SpecializePass(priority=True, force=True)
    assert forced.apply(model(causal=True), Context()).matched == 2
    graph = Graph()
    b = Builder(graph, loc="layers.0.ffn")
    x = graph.input("x", tensor(F64, batch="B", seq="S", embed=EMBED))
    x = b.add(x, attend(b, x, x, x, over="embed"))
    w = graph.param("w", tensor(F64, expert=4, embed=EMBED))
    e, g, p = emit_expert_choice(b, x, w, tokens=TOKENS, capacity_factor=1.0)
    graph.set_output("y", b.combine(b.dispatch(x, e, p), e, p, g))
    with pytest.raises(InputError, match="expert choice in a decoder"):
        SpecializePass().apply(clone(graph), Context())
    assert SpecializePass(force=True, capacity_factor=2.0).apply(graph, Context()).matched == 1
    (node,) = nodes(graph, "expert_choice")
    assert node.attrs["capacity_factor"] == 2.0
