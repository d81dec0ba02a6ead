"""Why a target cannot say a graph, in words that a user can act on."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moecc_passes.upcycle.upcycle import UpcyclePass

from moecc.errors import Problem
from moecc.families import build
from moecc.families.decoder import DecoderConfig
from moecc.families.experts import expert_layers
from moecc.families.mixture import MoeConfig
from moecc.families.registry import parse_config
from moecc.ir import Graph
from moecc.rewrite.passes import Context
from moecc.testing.configs import small_configs
from moecc.translate.propose import propose

from .small_config import SMALL as SIZES


def graph_of(family: str, options: dict[str, Any] | None = None, **keys: Any) -> Graph:
    graph = build(parse_config({"model_type": family, **SIZES, **keys}))
    if options is not None:
        UpcyclePass(**{"experts": 4, "top_k": 2, **options}).apply(graph, Context())
    return graph


def config(graph: Graph, target: str) -> MoeConfig:
    found = propose(graph, target)
    assert isinstance(found, MoeConfig)
    return found


def reasons(graph: Graph, target: str) -> list[Problem]:
    found = propose(graph, target)
    assert isinstance(found, list)
    assert found
    return found


def test_mixtral_has_experts_everywhere() -> None:
    (reason,) = reasons(graph_of("qwen3", {"layers": "3"}, head_dim=4), "mixtral")[:1]
    assert reason.what == ("mixtral has an expert layer at every depth; layers 0-2 here are dense")
    assert reason.hint == "qwen2_moe and qwen3_moe can express that with mlp_only_layers"


def test_the_reasons_are_complete() -> None:
    graph = graph_of("qwen2", {"layers": "0,2", "gates": "softmax", "shared": 0.5})
    assert [r.what for r in reasons(graph, "mixtral")] == [
        "mixtral cannot express softmax gates",
        "mixtral has no shared expert",
        "mixtral has an expert layer at every depth; layers 1, 3 here are dense",
        "mixtral has no biases on the query, key and value projections",
    ]


@pytest.mark.parametrize(
    ("family", "options", "target", "what", "hint"),
    [
        ("llama", {}, "qwen3_moe", "always has norms of the queries and keys", "mixtral, granite"),
        ("qwen3", {}, "mixtral", "mixtral has no norms of the queries and keys", "qwen3_moe can"),
        ("qwen2", {}, "mixtral", "has no biases on the query", None),
        ("llama", {}, "qwen2_moe", "has a shared expert in every sparse layer", "shared=0.5"),
        ("llama", {"shared": 0.5}, "mixtral", "mixtral has no shared expert", "qwen2_moe"),
        ("llama", {"gates": "softmax"}, "mixtral", "cannot express softmax", "qwen3_moe, "),
        ("llama", {"gates": "sigmoid"}, "mixtral", "cannot express sigmoid gates", None),
        ("qwen3", {"gates": "sigmoid"}, "qwen3_moe", "cannot express sigmoid gates", None),
        ("llama", {"gate_scale": 2.5}, "mixtral", "has no factor on the gates", "gate-scale=1"),
        ("llama", {"slots": "capacity"}, "mixtral", "it has no capacity", None),
        (
            "llama", {"slots": "capacity", "groups": 2}, "mixtral", "has no token groups", None
        ),
    ],
)  # fmt: skip
def test_what_a_target_cannot_say(
    family: str, options: dict[str, Any], target: str, what: str, hint: str | None
) -> None:
    found = reasons(graph_of(family, options), target)
    matching = [r for r in found if what in r.what]
    assert len(matching) == 1
    if hint is not None:
        assert hint in str(matching[0].hint)


def test_layers_with_different_experts_cannot_be_said() -> None:
    graph = graph_of("llama", {"layers": "0,1"})
    UpcyclePass(experts=8, top_k=1, layers="2,3").apply(graph, Context())
    (reason,) = reasons(graph, "mixtral")
    assert reason.what == "mixtral has the same experts in every sparse layer"
    assert reason.found == (
        "layer 0: 4 experts of 24, top-2, renormalised; "
        "layer 2: 8 experts of 24, top-1, renormalised"
    )


def test_windows_that_differ_between_layers_cannot_be_said() -> None:
    keys = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    graph = graph_of("qwen3", {}, **keys)
    (reason,) = reasons(graph, "qwen3_moe")
    assert reason.what == "qwen3_moe has the same sliding window in every layer"


def test_a_dense_graph_is_no_mixture_and_a_mixture_is_not_dense() -> None:
    (reason,) = reasons(graph_of("llama"), "mixtral")
    assert "no layer here is one" in reason.what
    assert (
        reason.hint == "make some layers sparse first: upcycle{experts=8 top-k=2} in the pipeline"
    )
    (reason,) = reasons(graph_of("llama", {}), "llama")
    assert reason.what == "llama has no mixture of experts; layers 0-3 here are one"


def test_a_location_that_names_no_layer_is_told() -> None:
    graph = graph_of("llama", {})
    for node in graph:
        node.loc = node.loc.replace("layers.1", "somewhere")
    (reason,) = reasons(graph, "mixtral")
    assert reason.where == "somewhere.ffn"


def test_the_config_follows_from_source_and_expert_layers() -> None:
    made = config(graph_of("llama", {"experts": 8, "top_k": 4, "granularity": 2}), "mixtral")
    assert (made.num_experts, made.experts_per_token) == (8, 4)
    assert made.intermediate_size == made.expert_intermediate_size == 12
    assert made.norm_topk_prob
    made = config(graph_of("qwen2", {"shared": 0.25, "gates": "softmax"}), "qwen2_moe")
    assert made.expert_intermediate_size == 18
    assert made.shared_expert_intermediate_size == 6
    assert made.intermediate_size == 24
    assert not made.norm_topk_prob


@pytest.mark.parametrize(
    ("layers", "step", "dense"),
    [
        ("all", 1, ()),
        ("every:2", 2, ()),
        ("every:4", 4, ()),
        ("last:1", 4, ()),
        ("2", 3, ()),
        ("0,3", 1, (1, 2)),
        ("first:half", 1, (2, 3)),
    ],
)
def test_which_layers_are_sparse_is_said_in_the_shortest_way(
    layers: str, step: int, dense: tuple[int, ...]
) -> None:
    graph = graph_of("qwen3", {"layers": layers})
    made = config(graph, "qwen3_moe")
    assert (made.decoder_sparse_step, made.mlp_only_layers) == (step, dense)
    sparse = {layer.loc for layer in expert_layers(graph)}
    assert {f"layers.{i}.ffn" for i, is_sparse in enumerate(made.sparse_layers) if is_sparse} == (
        sparse
    )


def test_a_source_keeps_its_own_way_to_say_which_layers_are_sparse() -> None:
    keys = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    graph = graph_of("qwen3_moe", mlp_only_layers=[0, 1, 2], **keys)
    assert config(graph, "qwen3_moe").mlp_only_layers == (0, 1, 2)


@given(small_configs(), st.sampled_from(["mixtral", "qwen2_moe", "qwen3_moe"]))
@settings(max_examples=60)
def test_a_mixture_proposes_its_own_config(source: DecoderConfig, target: str) -> None:
    found = propose(build(source), target)
    if target == source.model_type:
        assert found == parse_config(source.to_json())
    else:
        assert isinstance(found, list) or isinstance(source, MoeConfig)
