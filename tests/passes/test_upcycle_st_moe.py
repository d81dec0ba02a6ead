"""The sparse block of ST-MoE: an extra dense sublayer, a bias in the experts, and where they go."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moecc_passes.upcycle.upcycle import UpcyclePass

from moecc.ir import F64, Builder, Graph, tensor
from moecc.ir.structure import clone
from moecc.rewrite.passes import Context
from moecc.testing import laws

from .dense_blocks import Dense, Tensors, relative, run, tokens, upcycled

EXACT = 1e-12
WHERE = st.sampled_from(["before", "after"])
BIASES = st.sampled_from(["multiplicative", "additive"])


SHAPES = [
    Dense(layers=2, residual=True),
    Dense(layers=2, residual=True, gated=False, act="relu", bias_in=True, bias_out=True),
    Dense(layers=1, residual=True, act="gelu", transposed=True),
]


def same_function(graph, **options):
    """Check that a conversion changes nothing; return its graph and parameters."""
    tensors = Tensors(graph)
    after, result = upcycled(graph, **options)
    inputs = {"x": tokens(Dense(embed=8), 12)["x"]}
    expected = run(graph, tensors.params(graph), inputs)["y"]
    params = tensors.params(after)
    assert relative(run(after, params, inputs)["y"], expected) <= EXACT
    assert result.preserves.kind == "reassociation"
    laws.check_graph(after)
    return after, params, tensors


@pytest.mark.parametrize("dense", SHAPES)
@given(where=WHERE, bias=BIASES)
def test_extra_sublayer_and_bias_change_nothing_at_first(dense, where, bias):
    after, params, _ = same_function(dense.graph(), extra_ffn=where, expert_bias=bias)
    extra = {n for n in params if ".extra" in n}
    assert len(extra) == dense.layers * len(dense_names(dense))
    assert {n.loc for n in after if n.origin == "upcycle/extra-ffn"} == {
        f"layers.{i}.extra_ffn" for i in range(dense.layers)
    }


def dense_names(dense):
    """Return the parameters of one layer of `dense`."""
    return [n for n in dense.graph().params if n.startswith("layers.0.")]


@pytest.mark.parametrize("bias", ["multiplicative", "additive"])
def test_a_trained_bias_acts_on_the_hidden_value_of_its_expert(bias):
    dense = Dense()
    graph = dense.graph()
    after, params, tensors = same_function(graph, expert_bias=bias, experts=3, top_k=3)
    values = np.random.default_rng(0).normal(size=(3, 12))
    params["layers.0.ffn.expert_bias"] = values
    x = tokens(dense)["x"]
    w = {n: tensors.arrays[f"layers.0.{n}"] for n in ("gate", "up", "down")}
    hidden = (x @ w["gate"].T) / (1 + np.exp(-(x @ w["gate"].T))) * (x @ w["up"].T)
    logits = x @ params["layers.0.ffn.router.weight"].T
    share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    each = (
        hidden[..., None, :] * values if bias == "multiplicative" else hidden[..., None, :] + values
    )
    expected = np.einsum("bse,bsem,dm->bsd", share, each, w["down"])
    assert relative(run(after, params, {"x": x})["y"], expected) <= EXACT


# --- placement


def converted(graph, **options):
    after = clone(graph)
    UpcyclePass(**options).apply(after, Context(allow_unmatched=True))
    return [n.loc for n in after if n.op.name == "dispatch"]


@pytest.mark.parametrize(
    ("total", "spec", "expected"),
    [
        (24, "every:4", [3, 7, 11, 15, 19, 23]),
        (12, "every:4", [3, 7, 11]),
        (12, "middle:4", [4, 5, 6, 7]),
        (5, "middle:2", [2, 3]),
        (5, "middle:9", [0, 1, 2, 3, 4]),
        (3, "nowhere", []),
    ],
)
def test_layouts_of_flaxformer(total, spec, expected):
    graph = Dense(embed=2, mlp=2, layers=total).graph()
    assert converted(graph, layers=spec) == [f"layers.{i}.ffn" for i in expected]


def two_stacks():
    graph = Graph("two")
    b = Builder(graph)
    dense = Dense(embed=2, mlp=2)
    x = graph.input("x", tensor(F64, batch="B", seq="S", embed=2))
    for stack, layers in (("encoder", 4), ("decoder", 2)):
        for layer in range(layers):
            with b.at(f"{stack}.layers.{layer}.ffn"):
                x = dense.block(b, x, f"layers.{stack[0]}{layer}")
    graph.set_output("y", x)
    return graph


def test_encoder_and_decoder_may_differ():
    graph = two_stacks()
    assert len(converted(graph)) == 6
    encoder = ["encoder.layers.1.ffn", "encoder.layers.3.ffn"]
    assert converted(graph, layers="every:2", decoder_layers="nowhere") == encoder
    assert converted(graph, layers="every:2", decoder_layers="last:1") == [
        *encoder,
        "decoder.layers.1.ffn",
    ]
    assert converted(graph, layers="every:2") == [*encoder, "decoder.layers.1.ffn"]


# --- experts that choose tokens


def test_experts_that_choose_tokens_keep_the_function_of_those_they_take():
    dense = Dense(residual=True)
    graph = dense.graph()
    tensors = Tensors(graph)
    after, result = upcycled(graph, routing="expert-choice", capacity_factor=0.75)
    laws.check_graph(after)
    assert result.preserves.kind == "approximate"
    (slots,) = (n.results[-1] for n in after if n.op.name == "expert_choice")
    after.set_output("assign_slots", slots)
    inputs = tokens(dense, 32)
    expected = run(graph, tensors.params(graph), inputs)["y"]
    found = run(after, tensors.params(after), inputs)
    taken = (found["assign_slots"] >= 0).any(-1)
    assert 0 < taken.mean() < 1
    assert relative(found["y"][taken], expected[taken]) <= EXACT
    np.testing.assert_array_equal(found["y"][~taken], inputs["x"][~taken])
