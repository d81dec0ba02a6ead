"""Small models keep what a pass may depend on."""

from __future__ import annotations

from math import prod

import pytest
from family_configs import small_configs
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.families import build, rebuild
from moecc.families.decoder import DecoderConfig
from moecc.families.mixture import MoeConfig
from moecc.families.registry import parse_config
from moecc.families.shrinking import shrink_config, shrink_size
from moecc.ir import F32, equal, verify

PUBLISHED = [
    {"model_type": "llama"},
    {
        "model_type": "llama", "vocab_size": 49_152, "hidden_size": 576,
        "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    {"model_type": "mistral"},
    {"model_type": "qwen2", "hidden_size": 896, "num_attention_heads": 14,
     "num_key_value_heads": 2, "intermediate_size": 4864},
    {"model_type": "qwen3"},
    {"model_type": "mixtral", "num_local_experts": 8},
    {"model_type": "qwen2_moe", "num_experts": 60},
    {"model_type": "qwen3_moe", "num_experts": 128, "num_local_experts": 128},
]  # fmt: skip


@given(st.integers(1, 200_000), st.integers(2, 200))
def test_a_shrunk_size_is_small_and_made_of_the_same_primes(size: int, most: int) -> None:
    small = shrink_size(size, most)
    assert 1 <= small <= most
    if size <= most:
        assert small == size
    elif small not in (1, 3, 7, 13):
        assert size % small == 0


@pytest.mark.parametrize("keys", PUBLISHED, ids=lambda k: k["model_type"])
def test_published_models_become_small(keys: dict[str, object]) -> None:
    config = parse_config(keys)
    small = shrink_config(config)
    graph = build(small)
    verify(graph)
    per_layer = sum(
        prod(v.type.shape) for v in graph.params.values() if v.loc.startswith("layers.0.")
    )
    assert per_layer < 200_000
    check_structure(config, small)


@given(small_configs())
@settings(max_examples=50)
def test_every_config_shrinks_to_one_of_the_same_structure(config: DecoderConfig) -> None:
    check_structure(config, shrink_config(config))


def check_structure(config: DecoderConfig, small: DecoderConfig) -> None:
    assert type(small) is type(config)
    kept = ("num_hidden_layers", "rope", "hidden_act", "tie_word_embeddings", "rms_norm_eps")
    kept += ("qkv_bias", "output_bias", "mlp_bias", "qk_norm")
    if isinstance(config, MoeConfig):
        kept += ("num_experts", "experts_per_token", "sparse_layers", "norm_topk_prob")
        assert (config.shared_expert_intermediate_size is None) == (
            small.shared_expert_intermediate_size is None
        )
    for name in kept:
        assert getattr(small, name) == getattr(config, name)
    assert [w is None for w in small.sliding_windows] == [w is None for w in config.sliding_windows]
    for name in ("vocab_size", "intermediate_size", "head_dim", "num_key_value_heads"):
        assert getattr(small, name) <= getattr(config, name)
    grouped = config.num_attention_heads > config.num_key_value_heads
    assert (small.num_attention_heads > small.num_key_value_heads) == grouped


@given(small_configs())
@settings(max_examples=20)
def test_a_graph_is_rebuilt_from_its_attributes(config: DecoderConfig) -> None:
    graph = build(parse_config(config.to_json()))
    again = rebuild(graph.attrs, shrink=False)
    assert equal(again, graph)
    small = rebuild(graph.attrs)
    assert [(n.op.name, n.loc) for n in small] == [(n.op.name, n.loc) for n in graph]
    assert list(small.params) == list(graph.params)
    for value in small.params.values():
        assert value.weight is not None
        assert value.weight.type.dtype is F32
