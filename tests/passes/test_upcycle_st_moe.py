"""The sparse block of ST-MoE: an extra dense sublayer, a bias in the experts, and where they go."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moecc_passes.upcycle.upcycle import UpcyclePass

from moecc.ir import F64, Builder, Graph, tensor
from moecc.testing import laws
from tests.st_moe.layers import softmax

from .dense_blocks import EXACT, Dense, Tensors, error, relative, run, shown, tokens, upcycled

BIASES = ["multiplicative", "additive"]

SHAPES = [
    Dense(layers=2, residual=True),
    Dense(layers=2, residual=True, gated=False, act="relu", bias_in=True, bias_out=True),
    Dense(residual=True, act="gelu", transposed=True),
]


def same_function(graph, **options):
    """Check that a conversion changes nothing; return its graph."""
    after, result = upcycled(graph, **options)
    assert error(graph, after, tokens(Dense())) <= EXACT
    assert result.preserves.kind == "reassociation"
    return after


@pytest.mark.parametrize("dense", SHAPES)
@given(where=st.sampled_from(["before", "after"]), bias=st.sampled_from(BIASES))
def test_extra_sublayer_and_bias_change_nothing_at_first(dense, where, bias):
    graph = dense.graph()
    after = same_function(graph, extra_ffn=where, expert_bias=bias)
    assert sum(".extra" in name for name in after.params) == len(graph.params)
    assert {n.loc for n in after if n.origin == "upcycle/extra-ffn"} == {
        f"layers.{i}.extra_ffn" for i in range(dense.layers)
    }


@pytest.mark.parametrize("bias", BIASES)
def test_a_trained_bias_acts_on_the_hidden_value_of_its_expert(bias):
    graph = Dense().graph()
    after = same_function(graph, expert_bias=bias, experts=3, top_k=3)
    tensors = Tensors(graph)
    params = tensors.params(after)
    values = np.random.default_rng(0).normal(size=(3, 12))
    params["layers.0.ffn.expert_bias"] = values
    x = tokens(Dense())["x"]
    gate, up, down = (tensors.arrays[f"layers.0.{n}"] for n in ("gate", "up", "down"))
    hidden = (x @ gate.T) / (1 + np.exp(-(x @ gate.T))) * (x @ up.T)
    share = softmax(x @ params["layers.0.ffn.router.weight"].T)
    hidden = hidden[..., None, :]
    each = hidden * values if bias == "multiplicative" else hidden + values
    expected = np.einsum("bse,bsem,dm->bsd", share, each, down)
    assert relative(run(after, params, {"x": x})["y"], expected) <= EXACT


# --- placement


def converted(graph, **options):
    after, _ = laws.applied(UpcyclePass(**options), graph)
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


def test_encoder_and_decoder_may_differ():
    graph = Graph("two")
    b = Builder(graph)
    x = graph.input("x", tensor(F64, batch="B", seq="S", embed=2))
    encoder = [f"encoder.layers.{i}.ffn" for i in range(4)]
    decoder = [f"decoder.layers.{i}.ffn" for i in range(2)]
    for number, loc in enumerate([*encoder, *decoder]):
        with b.at(loc):
            x = Dense(embed=2, mlp=2).block(b, x, f"layers.{number}")
    graph.set_output("y", x)
    assert converted(graph) == [*encoder, *decoder]
    every_second = [encoder[1], encoder[3]]
    assert converted(graph, layers="every:2", decoder_layers="nowhere") == every_second
    both = [*every_second, decoder[1]]
    assert converted(graph, layers="every:2", decoder_layers="last:1") == both
    assert converted(graph, layers="every:2") == both


# --- experts that choose tokens


def test_experts_that_choose_tokens_keep_the_function_of_those_they_take():
    graph = Dense(residual=True).graph()
    tensors = Tensors(graph)
    after, result = upcycled(graph, routing="expert-choice", capacity_factor=0.75)
    assert result.preserves.kind == "approximate"
    shown(after, "expert_choice")
    inputs = tokens(Dense(), 32)
    expected = run(graph, tensors.params(graph), inputs)["y"]
    found = run(after, tensors.params(after), inputs)
    taken = (found["expert_choice.2"] >= 0).any(-1)
    assert 0 < taken.mean() < 1
    assert relative(found["y"][taken], expected[taken]) <= EXACT
    np.testing.assert_array_equal(found["y"][~taken], inputs["x"][~taken])
