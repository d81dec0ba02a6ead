"""Why a target cannot say a graph, in words that a user can act on."""

import pytest
from family_configs import small_configs
from hypothesis import given, settings
from hypothesis import strategies as st
from moecc_passes.upcycle.upcycle import UpcyclePass

from moecc.families import build
from moecc.families.experts import expert_layers
from moecc.families.mixture import MoeConfig
from moecc.families.registry import parse_config
from moecc.rewrite.passes import Context
from moecc.translate.propose import propose

from .small_config import small


def graph_of(family, options=None, **keys):
    graph = build(parse_config(small(family, **keys)))
    if options is not None:
        UpcyclePass(**{"experts": 4, "top_k": 2, **options}).apply(graph, Context())
    return graph


def config(graph, target):
    found = propose(graph, target)
    assert isinstance(found, MoeConfig)
    return found


def reasons(graph, target):
    found = propose(graph, target)
    assert isinstance(found, list)
    assert found
    return found


@pytest.mark.parametrize(
    ("family", "options", "target", "what", "hint"),
    [
        ("llama", {}, "qwen3_moe", "always has norms of the queries and keys", "mixtral, qwen2"),
        ("qwen3", {}, "mixtral", "mixtral has no norms of the queries and keys", "qwen3_moe can"),
        ("qwen2", {}, "mixtral", "has no biases on the query", None),
        ("llama", {"gates": "sigmoid-renormalised"}, "glm4_moe", "has a shared expert in every",
         "shared=0.5"),
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
def test_what_a_target_cannot_say(family, options, target, what, hint):
    found = reasons(graph_of(family, options), target)
    matching = [r for r in found if what in r.message]
    assert len(matching) == 1
    if hint is not None:
        assert hint in str(matching[0].hint)


def test_the_config_follows_from_source_and_expert_layers():
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
def test_which_layers_are_sparse_is_said_in_the_shortest_way(layers, step, dense):
    graph = graph_of("qwen3", {"layers": layers})
    made = config(graph, "qwen3_moe")
    assert (made.decoder_sparse_step, made.mlp_only_layers) == (step, dense)
    sparse = {layer.loc for layer in expert_layers(graph)}
    assert {f"layers.{i}.ffn" for i, is_sparse in enumerate(made.sparse_layers) if is_sparse} == (
        sparse
    )


@given(small_configs(), st.sampled_from(["mixtral", "qwen2_moe", "qwen3_moe"]))
@settings(max_examples=60)
def test_a_mixture_proposes_its_own_config(source, target):
    found = propose(build(source), target)
    if target == source.model_type:
        assert found == parse_config(source.to_json())
    else:
        assert isinstance(found, list) or isinstance(source, MoeConfig)
