"""The paper's conversion as one pass, and the groups of its fine-tuning study."""

import numpy as np
import pytest

from moecc.analysis import GROUPS, parameter_groups, trainable
from moecc.errors import InputError
from moecc.ir import clone, equal, parse, print_graph
from moecc.testing import inputs_for, laws, params_for, run_reference
from tests.passes.model_graphs import apply_passes

from .layers import nodes, transformer


def converted(text="st-moe{experts=4}", layers=8):
    graph = transformer(layers)
    apply_passes(graph, text)
    laws.check_graph(graph)
    return graph


def logits_of(graph):
    sizes = {"B": 2, "S": 6}
    inputs, params = inputs_for(graph, 0, sizes), params_for(graph, 0, sizes)
    return run_reference(graph, inputs=inputs, params=params)["logits"]


def test_the_conversion_keeps_the_function():
    before = transformer()
    after = clone(before)
    assert apply_passes(after, "st-moe{experts=4}").preserves.kind == "reassociation"
    assert np.abs(logits_of(before) - logits_of(after)).max() < 1e-12
    sparse = [n.loc for n in nodes(after, "dispatch") if n.origin.startswith("upcycle")]
    assert sparse == ["layers.3.ffn", "layers.7.ffn"]
    extra = {n.loc for n in after if "extra" in n.loc}
    assert extra == {"layers.3.extra_ffn", "layers.7.extra_ffn"}
    assert {"loss.balance", "loss.router_z", "loss.auxiliary"} <= set(after.output_names)
    assert sum("expert_bias" in n for n in after.params) == 2


def test_it_is_what_its_parts_make():
    after = converted()
    parts = converted(
        "upcycle{experts=4 top-k=2 layers=every:4 extra-ffn=after expert-bias=multiplicative "
        "router-init=switch router-std=0.3162},add-losses{balance-coef=0.01 z-coef=0.001}"
    )
    parts.attrs["routing"] = after.attrs["routing"]
    assert equal(after, parts)


def test_modes_come_from_what_the_pass_recorded():
    text = print_graph(converted())
    for mode, factor, policies in (("train", 1.25, [("random", 0.2)] * 2), ("eval", 2.0, [])):
        graph = parse(text)
        apply_passes(graph, f"specialize{{mode={mode}}}")
        factors = [n.attrs["capacity_factor"] for n in nodes(graph, "assign_slots")]
        assert factors == [factor] * 2
        keeps = [(n.attrs["policy"], n.attrs["threshold"]) for n in nodes(graph, "keep_choices")]
        assert keeps == policies
        assert ("key" in graph.inputs) == (mode == "train")


# --- groups of parameters


def test_groups_of_a_sparse_model():
    graph = converted(layers=4)
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
    graph = parse(print_graph(converted(f"st-moe{{experts=4}},freeze{{{text}}}", layers=4)))
    groups = parameter_groups(graph)
    assert trainable(graph) == {n: trained(of) for n, of in groups.items()}


# --- the trace


def test_the_trace_tells_where_tokens_went():
    graph = converted("st-moe{experts=4 losses=false mode=eval},trace-routing")
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
        apply_passes(graph, "trace-routing")
