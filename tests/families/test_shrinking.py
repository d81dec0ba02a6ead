"""Small models keep what a pass may depend on."""

from family_configs import small_configs
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.families import build, rebuild
from moecc.families.mixture import MoeConfig
from moecc.families.registry import parse_config
from moecc.families.shrinking import shrink_size
from moecc.ir import F32, equal


@given(st.integers(1, 200_000), st.integers(2, 200))
def test_a_shrunk_size_is_small_and_made_of_the_same_primes(size, most):
    small = shrink_size(size, most)
    assert 1 <= small <= most
    if size <= most:
        assert small == size
    elif small not in (1, 3, 7, 13):
        assert size % small == 0


@given(small_configs())
@settings(max_examples=50)
def test_every_config_shrinks_to_one_of_the_same_structure(config):
    check_structure(config, config.shrunk())


def check_structure(config, small):
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
def test_a_graph_is_rebuilt_from_its_attributes(config):
    graph = build(parse_config(config.to_json()))
    again = rebuild(graph.attrs, shrink=False)
    assert equal(again, graph)
    small = rebuild(graph.attrs)
    assert [(n.op.name, n.loc) for n in small] == [(n.op.name, n.loc) for n in graph]
    assert list(small.params) == list(graph.params)
    for value in small.params.values():
        assert value.weight.type.dtype is F32
