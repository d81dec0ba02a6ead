"""Typed configs: both spellings read, both written, and made for another family."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from moecc.errors import InputError
from moecc.families.config import ModelConfig
from moecc.families.decoder import DecoderConfig
from moecc.families.mixture import MoeConfig
from moecc.families.registry import CONFIGS, decoders, parse_config
from moecc.families.rope import RopeConfig
from tests.support.rotary_tables import rotary_frequencies

from .small_config import LLAMA3, YARN, small

PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text())


# ---------- configs of published models


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_in_the_spelling_of_published_models_are_read(name):
    config = parse_config(PUBLISHED[name])
    written = config.to_json()
    assert parse_config(written) == config
    (named,) = PUBLISHED[name]["architectures"]
    is_renamed = config.with_heads or named in config.aliases
    assert written["architectures"] == [config.architecture if is_renamed else named]


def test_the_registry_states_the_kind_of_each_family():
    kinds = (MoeConfig, DecoderConfig, ModelConfig)
    for name, kind in CONFIGS.kinds.items():
        assert next(k for k in kinds if issubclass(CONFIGS[name], k)) is kind, name


# ---------- two spellings, one meaning


@pytest.mark.parametrize("family", decoders())
@pytest.mark.parametrize(
    "scaling",
    [None, {"rope_type": "linear", "factor": 2}, LLAMA3, YARN],
    ids=["plain", "linear", "llama3", "yarn"],
)
def test_either_spelling_and_both_mean_the_same(family, scaling):
    kind = (scaling or {"rope_type": "default"})["rope_type"]
    if kind not in decoders()[family].rope_types or family == "gptj":
        return  # a gptj states no rotary positions
    four = {"rope_theta": 5e5, "rope_scaling": scaling}
    full = {"rope_theta": 5e5, **(scaling or {"rope_type": "default"})}
    if family in ("olmo3", "gemma3_text"):
        local = {"rope_theta": 5e5 if family == "olmo3" else 1e4, "rope_type": "default"}
        full = {"full_attention": full, "sliding_attention": local}
    five = {"rope_parameters": full}
    if family == "apertus" and scaling is None:
        four = five  # version 5 takes its own scaling
    config, *others = (parse_config(small(family, **k)) for k in (four, five, {**four, **five}))
    assert others == [config, config]
    assert config.rope.theta == 5e5
    assert config.rope.type == kind


# ---------- sliding windows


def test_windows_of_every_style():
    def windows(family, **keys):
        return parse_config(small(family, **keys)).sliding_windows

    on = {"use_sliding_window": True, "sliding_window": 8}
    assert windows("llama") == (None,) * 4
    assert windows("mistral") == (4096,) * 4
    assert windows("mistral", sliding_window=None) == (None,) * 4
    assert windows("mixtral") == (None,) * 4
    assert windows("qwen2", sliding_window=8, max_window_layers=2) == (None,) * 4
    assert windows("qwen2", **on, max_window_layers=3) == (None, None, None, 8)
    assert windows("qwen3", **on, max_window_layers=0) == (8,) * 4
    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    assert windows("qwen3", **on, layer_types=types) == (8, None, None, 8)
    assert windows("qwen3_moe", **on) == (8,) * 4
    assert windows("qwen3_moe", sliding_window=8) == (None,) * 4
    assert windows("qwen2_moe", **on, layer_types=["sliding_attention"] * 4) == (8,) * 4
    # What transformers 5 writes for a qwen2_moe without a window.
    assert windows("qwen2_moe", use_sliding_window=False, sliding_window=0) == (None,) * 4


def test_qwen2_moe_window_without_layer_types_is_refused():
    """The versions disagree: all layers in 4, every second one in 5."""
    with pytest.raises(InputError, match="transformers 4 puts the window on every layer"):
        parse_config(small("qwen2_moe", use_sliding_window=True, sliding_window=8))


# ---------- sparse layers


@pytest.mark.parametrize(
    ("family", "keys", "experts"),
    [
        ("mixtral", {"num_local_experts": 16, "num_experts": 16}, 16),
        ("qwen2_moe", {"num_experts": 16}, 16),
        ("qwen3_moe", {"num_local_experts": 16}, 16),
        ("qwen3_moe", {}, 128),
    ],
)
def test_number_of_experts(family, keys, experts):
    assert parse_config(small(family, **keys)).num_experts == experts


# ---------- configs made by an exporter


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("mixtral", {"qkv_bias": True}, "mixtral has no biases on the query"),
        ("mixtral", {"mlp_only_layers": (1, 2)}, "experts in every layer; [1, 2] would be"),
        ("mixtral", {"norm_topk_prob": False}, "always divides the chosen gates"),
        ("mixtral", {"sliding_windows": (8, None, 8, 8)}, "same sliding window in every"),
        ("mixtral", {"expert_intermediate_size": 12}, "one width"),
        ("mixtral", {"shared_expert_intermediate_size": 12}, "has no shared expert"),
        ("glm4_moe", {}, "glm4_moe needs a shared expert"),
        ("qwen3_moe", {}, "qwen3_moe always has norms of the queries and keys"),
        ("qwen3_moe", {"qk_norm": True, "qkv_bias": True}, "on all four projections or on none"),
        ("mixtral", {"experts_per_token": 9}, "cannot choose that many"),
        ("mixtral", {"rope": RopeConfig(theta=1e4, type="linear")}, "linear needs factor"),
        ("mixtral", {"rope": RopeConfig(theta=1e4, factor=2.0)}, "default has no factor"),
        ("mixtral", {"vocab_size": 0}, "not a usable size"),
        ("mixtral", {"sliding_windows": ()}, "one window (or None) for each layer"),
    ],
)
def test_a_family_says_why_it_cannot(family, changes, reason):
    common = parse_config(small("llama")).common()
    experts = {"num_experts": 4, "experts_per_token": 2, "expert_intermediate_size": 24}
    with pytest.raises(InputError, match=re.escape(reason)):
        CONFIGS[family](**{**common, **experts, **changes})


def test_a_llama_has_no_window_and_a_qwen2_one_size_of_it():
    with pytest.raises(InputError, match="llama has no sliding window"):
        replace(parse_config(small("llama")), sliding_windows=(8,) * 4)
    with pytest.raises(InputError, match="one size of sliding window"):
        replace(parse_config(small("qwen2")), sliding_windows=(8, 8, 9, 9))


@pytest.mark.parametrize("family", ["t5", "mt5", "umt5"])
def test_a_stated_activation_is_stronger_than_the_projection(family):
    keys = {"feed_forward_proj": "relu", "dense_act_fn": "silu"}
    assert parse_config(small(family, **keys)).hidden_act == "silu"
    gated = parse_config(small(family, **keys, is_gated_act=True))
    assert (gated.gated, gated.hidden_act) == (True, "silu")


# ---------- frequencies


def test_dynamic_scaling_starts_beyond_the_maximal_length():
    rope = RopeConfig(theta=100.0, type="dynamic", factor=2.0)
    inside = rotary_frequencies(rope, 4, max_position_embeddings=10, length=10)
    beyond = rotary_frequencies(rope, 4, max_position_embeddings=10, length=20)
    assert inside == pytest.approx((1, 0.1))
    # theta * (2 * 20 / 10 - 1) ** (4 / 2) = 900
    assert beyond == pytest.approx((1, 1 / 30))
