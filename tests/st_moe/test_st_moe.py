"""The paper's conversion as one pass, and the groups of its fine-tuning study."""

import numpy as np
import pytest

from moecc.analysis import GROUPS, parameter_groups, trainable
from moecc.errors import InputError
from moecc.ir import clone, equal, parse, print_graph
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.testing import inputs_for, laws, params_for, run_reference

from .layers import transformer


def converted(text="st-moe{experts=4}", layers=8):
    before = transformer(layers)
    after = clone(before)
    report = run_pipeline(after, Pipeline.parse(text))
    laws.check_graph(after)
    return before, after, report


def same_logits(before, after, seed=0):
    sizes = {"B": 2, "S": 6}
    inputs = inputs_for(before, seed, sizes)
    first, second = (
        run_reference(
            g, inputs=inputs_for(g, seed, sizes) | inputs, params=params_for(g, seed, sizes)
        )
        for g in (before, after)
    )
    return float(np.abs(first["logits"] - second["logits"]).max())


def test_the_conversion_keeps_the_function():
    before, after, report = converted()
    assert report.preserves.kind == "reassociation"
    assert same_logits(before, after) < 1e-12
    sparse = [n.loc for n in after if n.op.name == "dispatch" and n.origin.startswith("upcycle")]
    assert sparse == ["layers.3.ffn", "layers.7.ffn"]
    assert {n.loc for n in after if "extra" in n.loc} == {
        "layers.3.extra_ffn",
        "layers.7.extra_ffn",
    }
    assert {"loss.balance", "loss.router_z", "loss.auxiliary"} <= set(after.output_names)
    assert sum("expert_bias" in n for n in after.params) == 2


def test_it_is_what_its_parts_make():
    _, after, _ = converted()
    parts = clone(transformer())
    text = (
        "upcycle{experts=4 top-k=2 layers=every:4 extra-ffn=after expert-bias=multiplicative "
        "router-init=switch router-std=0.3162},add-losses{balance-coef=0.01 z-coef=0.001}"
    )
    run_pipeline(parts, Pipeline.parse(text))
    parts.attrs["routing"] = after.attrs["routing"]
    assert equal(after, parts)


def test_modes_come_from_what_the_pass_recorded():
    _, after, _ = converted()
    after = parse(print_graph(after))
    train, evaluated = clone(after), clone(after)
    run_pipeline(train, Pipeline.parse("specialize{mode=train}"))
    run_pipeline(evaluated, Pipeline.parse("specialize{mode=eval}"))
    for graph, factor, policies in ((train, 1.25, ["random"] * 2), (evaluated, 2.0, [])):
        places = [n for n in graph if n.op.name == "assign_slots"]
        assert [n.attrs["capacity_factor"] for n in places] == [factor] * 2
        assert [n.attrs["policy"] for n in graph if n.op.name == "keep_choices"] == policies
    thresholds = [n.attrs["threshold"] for n in train if n.op.name == "keep_choices"]
    assert thresholds == [0.2, 0.2]
    assert ("key" in train.inputs, "key" in evaluated.inputs) == (True, False)


# --- groups of parameters


def test_groups_of_a_sparse_model():
    _, graph, _ = converted(layers=4)
    groups = parameter_groups(graph)
    assert set().union(*groups.values()) == set(GROUPS)
    expected = {
        "table": {"all", "non-moe", "embedding"},
        "out": {"all", "non-moe", "embedding"},
        "0.n1": {"all", "non-moe", "norm"},
        "0.q": {"all", "non-moe", "attention"},
        "0.down": {"all", "non-moe", "ffn"},
        "3.up": {"all", "moe"},
        "3.up.extra": {"all", "non-moe", "ffn"},
        "layers.3.ffn.router.weight": {"all", "moe", "router"},
        "layers.3.ffn.expert_bias": {"all", "moe"},
    }
    assert {n: set(groups[n]) for n in expected} == expected
    for of in groups.values():
        assert ("moe" in of) != ("non-moe" in of)


@pytest.mark.parametrize(
    ("text", "trained"),
    [
        ("groups=moe", lambda of: "moe" not in of),
        ("groups=moe,norm", lambda of: not of & {"moe", "norm"}),
        ("only=attention", lambda of: "attention" in of),
        ("only=attention,ffn", lambda of: bool(of & {"attention", "ffn"})),
    ],
)
def test_masks(text, trained):
    _, graph, _ = converted(f"st-moe{{experts=4}},freeze{{{text}}}", layers=4)
    graph = parse(print_graph(graph))
    groups = parameter_groups(graph)
    assert trainable(graph) == {n: trained(of) for n, of in groups.items()}


# --- the trace


def test_the_trace_tells_where_tokens_went():
    _, graph, _ = converted("st-moe{experts=4 losses=false mode=eval},trace-routing")
    found = run_reference(graph)
    for layer in (3, 7):
        experts, gates, slots = (
            found[f"trace.layers.{layer}.ffn.{n}"] for n in ("experts", "gates", "slots")
        )
        assert experts.shape == gates.shape == slots.shape
        assert ((experts >= 0) & (experts < 4)).all()
        np.testing.assert_allclose(gates.sum(-1), 1, rtol=1e-12)
        assert (slots >= -1).all()
    with pytest.raises(InputError, match="traced already"):
        run_pipeline(graph, Pipeline.parse("trace-routing"))
