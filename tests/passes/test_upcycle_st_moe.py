"""The sparse block of ST-MoE: an extra dense sublayer, a bias in the experts, and where they go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moecc_passes.upcycle.upcycle import UpcyclePass

from moecc.errors import InputError
from moecc.ir import F64, Builder, Graph, Value, tensor
from moecc.ir.structure import clone
from moecc.jobs.checks import broken_promise
from moecc.model.open import open_model
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.testing import laws
from moecc.weights.expr import Full, Source

from .dense_blocks import Arrays, Dense, Tensors, relative, run, tokens, upcycled

EXACT = 1e-12
WHERE = st.sampled_from(["before", "after"])
BIASES = st.sampled_from(["multiplicative", "additive"])

GOLDEN = Path(__file__).parents[1] / "golden"


def post_norm(dense: Dense) -> Graph:
    """Return layers as BERT has them: the norm stands behind the sum."""
    graph = Graph("post")
    b = Builder(graph)
    hidden: Value = graph.input("x", tensor(F64, batch="B", seq="S", embed=dense.embed))
    for layer in range(dense.layers):
        with b.at(f"layers.{layer}.ffn"):
            type = tensor(F64, embed=dense.embed)
            scale, bias = (
                graph.param(n, type, Source(n, type), loc=b.loc)
                for n in (f"layers.{layer}.norm", f"layers.{layer}.norm.bias")
            )
            total = b.add(hidden, dense.block(b, hidden, f"layers.{layer}"))
            hidden = b.layer_norm(total, scale, bias, axis="embed")
    graph.set_output("y", hidden)
    return graph


SHAPES = [
    Dense(layers=2, residual=True),
    Dense(layers=2, residual=True, gated=False, act="relu", bias_in=True, bias_out=True),
    Dense(layers=1, residual=True, act="gelu", transposed=True),
]


def same_function(graph: Graph, **options: Any) -> tuple[Graph, Arrays, Tensors]:
    """Check that a conversion changes nothing; return its graph and parameters."""
    tensors = Tensors(graph)
    after, result = upcycled(graph, **options)
    inputs = {"x": tokens(Dense(embed=8), 12)["x"]}
    expected = run(graph, tensors.params(graph), inputs)["y"]
    params = tensors.params(after)
    assert relative(run(after, params, inputs)["y"], expected) <= EXACT
    assert result.preserves is not None
    assert result.preserves.kind == "reassociation"
    laws.check_graph(after)
    return after, params, tensors


@pytest.mark.parametrize("dense", SHAPES)
@given(where=WHERE, bias=BIASES)
def test_extra_sublayer_and_bias_change_nothing_at_first(
    dense: Dense, where: str, bias: str
) -> None:
    after, params, _ = same_function(dense.graph(), extra_ffn=where, expert_bias=bias)
    extra = {n for n in params if ".extra" in n}
    assert len(extra) == dense.layers * len(dense_names(dense))
    assert {n.loc for n in after if n.origin == "upcycle/extra-ffn"} == {
        f"layers.{i}.extra_ffn" for i in range(dense.layers)
    }


def dense_names(dense: Dense) -> list[str]:
    """Return the parameters of one layer of `dense`."""
    return [n for n in dense.graph().params if n.startswith("layers.0.")]


@given(WHERE)
def test_behind_a_post_norm_the_extra_sublayer_has_no_norm(where: str) -> None:
    dense = Dense(layers=2)
    after, params, _ = same_function(post_norm(dense), extra_ffn=where)
    assert not any(".norm.extra" in n for n in params)
    norms = [n for n in after if n.op.name == "layer_norm"]
    assert len(norms) == 2


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_trained_extra_sublayer_stands_on_its_side(where: str) -> None:
    """With weights in its last matrix it adds a dense block to the stream, before or after."""
    dense = Dense(residual=True)
    graph = dense.graph()
    after, params, tensors = same_function(graph, extra_ffn=where)
    rng = np.random.default_rng(0)
    params["layers.0.down.extra"] = rng.normal(size=params["layers.0.down.extra"].shape)
    params["layers.0.norm.extra"] = rng.normal(size=8)
    x = tokens(dense)["x"]
    plain = tensors.params(graph)
    other = {
        **plain,
        "layers.0.down": params["layers.0.down.extra"],
        "layers.0.norm": params["layers.0.norm.extra"],
    }
    order = [other, plain] if where == "before" else [plain, other]
    expected = x
    for weights in order:
        expected = run(graph, weights, {"x": expected})["y"]
    assert relative(run(after, params, {"x": x})["y"], expected) <= EXACT


@pytest.mark.parametrize("bias", ["multiplicative", "additive"])
def test_a_trained_bias_acts_on_the_hidden_value_of_its_expert(bias: str) -> None:
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


def test_initial_values() -> None:
    dense = Dense(residual=True, bias_out=True)
    after, _ = upcycled(dense.graph(), extra_ffn="after", expert_bias="multiplicative")
    weights = {n: p.weight for n, p in after.params.items()}
    ones = weights["layers.0.ffn.expert_bias"]
    assert isinstance(ones, Full)
    assert ones.value == 1.0
    for name in ("layers.0.down.extra", "layers.0.down.bias.extra"):
        zeros = weights[name]
        assert isinstance(zeros, Full)
        assert zeros.value == 0.0
    assert weights["layers.0.up.extra"] == Source(
        "layers.0.up", after.params["layers.0.up.extra"].type
    )


@given(st.integers(1, 3), st.sampled_from([0.0, 0.25]), WHERE, BIASES)
def test_granularity_and_a_shared_expert_go_with_both(
    slices: int, shared: float, where: str, bias: str
) -> None:
    slices = {1: 1, 2: 3, 3: 1}[slices]
    same_function(
        Dense(layers=1, residual=True).graph(),
        experts=6, top_k=3, granularity=slices, shared=shared, extra_ffn=where, expert_bias=bias,
    )  # fmt: skip


def test_a_block_without_a_residual_gets_no_sublayer_beside_it() -> None:
    with pytest.raises(InputError, match="no extra sublayer can be added to the block"):
        UpcyclePass(extra_ffn="after").apply(Dense().graph(), Context())


# --- placement


def converted(graph: Graph, **options: Any) -> list[str]:
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
def test_layouts_of_flaxformer(total: int, spec: str, expected: list[int]) -> None:
    graph = Dense(embed=2, mlp=2, layers=total).graph()
    assert converted(graph, layers=spec) == [f"layers.{i}.ffn" for i in expected]


def two_stacks() -> Graph:
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


def test_encoder_and_decoder_may_differ() -> None:
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


def test_experts_that_choose_tokens_keep_the_function_of_those_they_take() -> None:
    dense = Dense(residual=True)
    graph = dense.graph()
    tensors = Tensors(graph)
    after, result = upcycled(graph, routing="expert-choice", capacity_factor=0.75)
    laws.check_graph(after)
    assert result.preserves is not None
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


def test_groups_that_do_not_divide_a_batch_of_known_size() -> None:
    graph = Graph("fixed")
    b = Builder(graph)
    x = graph.input("x", tensor(F64, batch=2, seq=3, embed=2))
    with b.at("layers.0.ffn"):
        graph.set_output("y", Dense(embed=2, mlp=2).block(b, x, "layers.0"))
    with pytest.raises(InputError, match="the groups do not divide the tokens"):
        UpcyclePass(slots="capacity", groups=4).apply(graph, Context())


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("case", ["gemma_mqa", "gemma_square", "llama_gqa", "bert_gelu"])
def test_the_extra_sublayer_has_a_norm_like_that_of_the_block(case: str, where: str) -> None:
    """Gemma's gain is computed from its parameter."""
    with open_model(str(GOLDEN / case)) as model:
        before = clone(model.graph)
        passes = Pipeline.parse(f"upcycle{{experts=4 extra-ffn={where}}}")
        done = run_pipeline(model.graph, passes)
        assert broken_promise(done.preserves, before, model.graph) == []
        extra = [n for n in model.graph if ".extra_ffn" in n.loc and n.op.is_norm]
        assert len(extra) == (0 if case == "bert_gelu" else len({n.loc for n in extra}))
