"""Typed configs: both spellings read, both written, and made for another family."""

from __future__ import annotations

import math
import pickle
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from typing import Any

import pytest

from moecc.errors import InputError
from moecc.families.llama import LlamaConfig, MixtralConfig
from moecc.families.mixture import MoeConfig
from moecc.families.qwen import Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig
from moecc.families.registry import CONFIGS, decoders, parse_config
from moecc.families.rope import RopeConfig, attention_factor, rotary_frequencies

from .small_config import LLAMA3, MOE, SMALL, YARN, small


def refusal(data: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        parse_config(data)
    return caught.value


# ---------- configs of published models


def test_llama_3_1_8b() -> None:
    config = parse_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": LLAMA3,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.42.3",
            "use_cache": True,
            "vocab_size": 128256,
        }
    )
    assert isinstance(config, LlamaConfig)
    assert config.head_dim == 128
    assert config.dtype == "bfloat16"
    assert config.rope == RopeConfig(
        theta=5e5,
        type="llama3",
        factor=8,
        low_freq_factor=1,
        high_freq_factor=4,
        original_max_position_embeddings=8192,
    )
    assert config.extra["eos_token_id"] == [128001, 128008, 128009]
    assert config.extra["pretraining_tp"] == 1
    assert "transformers_version" not in config.to_json()


def test_smollm2_135m() -> None:
    config = parse_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "bos_token_id": 0,
            "eos_token_id": 0,
            "hidden_size": 576,
            "initializer_range": 0.041666666666666664,
            "intermediate_size": 1536,
            "is_llama_config": True,
            "max_position_embeddings": 8192,
            "model_type": "llama",
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "rms_norm_eps": 1e-05,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "vocab_size": 49152,
        }
    )
    assert (config.head_dim, config.rope, config.tie_word_embeddings) == (
        64,
        RopeConfig(theta=1e5),
        True,
    )
    assert config.extra["is_llama_config"] is True


def test_qwen3_30b_a3b() -> None:
    config = parse_config(
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_position_embeddings": 40960,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
            "vocab_size": 151936,
        }
    )
    assert isinstance(config, Qwen3MoeConfig)
    assert (config.num_experts, config.experts_per_token, config.head_dim) == (128, 8, 128)
    assert config.norm_topk_prob
    assert all(config.sparse_layers)
    assert config.qk_norm
    assert not config.qkv_bias


def test_qwen_1_5_moe_keeps_its_shared_expert() -> None:
    config = parse_config(
        {
            "model_type": "qwen2_moe",
            "max_window_layers": 21,
            "sliding_window": 32768,
            "use_sliding_window": False,
            "num_experts": 60,
            "shared_expert_intermediate_size": 5632,
            "norm_topk_prob": False,
        }
    )
    assert isinstance(config, Qwen2MoeConfig)
    assert config.shared_expert_intermediate_size == 5632
    assert config.sliding_windows == (None,) * 24
    assert config.qkv_bias
    assert not config.output_bias


def test_mixtral_experts_are_as_wide_as_intermediate_size() -> None:
    config = parse_config({"model_type": "mixtral"})
    assert isinstance(config, MixtralConfig)
    assert config.expert_intermediate_size == config.intermediate_size == 14336
    assert (config.num_experts, config.rope.theta, config.rms_norm_eps) == (8, 1e6, 1e-5)
    assert config.norm_topk_prob
    assert config.sparse_layers == (True,) * 32


# ---------- two spellings, one meaning


@pytest.mark.parametrize("family", decoders())
@pytest.mark.parametrize(
    "scaling",
    [None, {"rope_type": "linear", "factor": 2}, LLAMA3, YARN],
    ids=["plain", "linear", "llama3", "yarn"],
)
def test_either_spelling_and_both_mean_the_same(family: str, scaling: Any) -> None:
    if (scaling or {"rope_type": "default"})["rope_type"] not in decoders()[family].rope_types:
        return
    four = {"rope_theta": 5e5, "rope_scaling": scaling}
    five = {"rope_parameters": {"rope_theta": 5e5, **(scaling or {"rope_type": "default"})}}
    read = [parse_config(small(family, **keys)) for keys in (four, five, {**four, **five})]
    assert read[0] == read[1] == read[2]
    assert read[0].rope.theta == 5e5
    assert read[0].rope.type == (scaling or {}).get("rope_type", "default")


def test_what_is_written_says_everything_twice() -> None:
    written = parse_config(small("qwen3_moe", rope_scaling=YARN, torch_dtype="float16")).to_json()
    assert written["rope_parameters"] == {"rope_theta": 1e4, **written["rope_scaling"]}  # type: ignore[dict-item]
    assert written["dtype"] == written["torch_dtype"] == "float16"
    assert written["num_experts"] == written["num_local_experts"] == 4
    assert written["architectures"] == ["Qwen3MoeForCausalLM"]
    assert list(written) == sorted(written)


def test_old_name_of_the_scaling_type_is_read() -> None:
    config = parse_config(small("llama", rope_scaling={"type": "linear", "factor": 2}))
    assert config.rope == RopeConfig(theta=1e4, type="linear", factor=2.0)


def test_yarn_starts_from_the_maximal_length_where_nothing_else_is_said() -> None:
    config = parse_config(small("llama", rope_scaling=YARN))
    assert config.rope.original_max_position_embeddings == 64


def test_aliases_of_activations_become_one_name() -> None:
    assert parse_config(small("llama", hidden_act="swish")).hidden_act == "silu"
    assert parse_config(small("llama", hidden_act="gelu_new")).hidden_act == "gelu_pytorch_tanh"


def test_a_config_never_shares_lists_with_what_it_was_read_from() -> None:
    ids = [1, 2]
    config = parse_config(small("llama", eos_token_id=ids))
    ids.append(3)
    written = config.to_json()
    assert written["eos_token_id"] == [1, 2]
    written["eos_token_id"].append(4)  # type: ignore[attr-defined]
    assert config.extra["eos_token_id"] == [1, 2]


def test_configs_are_values() -> None:
    config = parse_config(small("qwen2_moe"))
    assert hash(config) == hash(parse_config(small("qwen2_moe")))
    assert pickle.loads(pickle.dumps(config)) == config
    assert config != parse_config(small("qwen2_moe", qkv_bias=False))
    assert replace(config, extra={"a": [1]}) != config, "every field is compared"
    assert hash(replace(config, extra={"a": [1]})) == hash(config), "extra cannot be hashed"
    assert config != vars(config)
    with pytest.raises(FrozenInstanceError):
        config.vocab_size = 3  # type: ignore[misc]


@pytest.mark.parametrize("family", CONFIGS)
def test_a_config_is_what_dataclass_would_make_of_it(family: str) -> None:
    """Its constructor, text, comparison and hash, written once for all families."""
    heads = {"head_dim": 64} if family == "glm4_moe" else {}
    made = parse_config({"model_type": family, **heads})
    twin = dataclass(frozen=True, kw_only=True)(type(type(made).__name__, (type(made),), {}))
    same = twin(**{f.name: getattr(made, f.name) for f in fields(made)})
    assert repr(same).partition("(")[2] == repr(made).partition("(")[2]
    assert hash(same) == hash(made)
    assert [f.name for f in fields(twin)] == [f.name for f in fields(made)]
    with pytest.raises(TypeError, match="no field 'wide'"):
        replace(made, wide=3)


def test_a_field_without_a_default_must_be_given() -> None:
    with pytest.raises(TypeError, match="MixtralConfig: the field 'hidden_size' is missing"):
        CONFIGS["mixtral"](vocab_size=8)


# ---------- sliding windows


def test_windows_of_every_style() -> None:
    def windows(family: str, **keys: Any) -> tuple[int | None, ...]:
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


def test_qwen2_moe_window_without_layer_types_is_refused() -> None:
    """The versions disagree: all layers in 4, every second one in 5."""
    error = refusal(small("qwen2_moe", use_sliding_window=True, sliding_window=8))
    assert "transformers 4 puts the window on every layer" in str(error)


def test_max_window_layers_is_written_for_readers_without_layer_types() -> None:
    config = parse_config(
        small("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=3)
    )
    assert config.to_json()["max_window_layers"] == 3


# ---------- sparse layers


def test_sparse_layers_follow_step_and_list() -> None:
    config = parse_config(small("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[3]))
    assert isinstance(config, MoeConfig)
    assert config.sparse_layers == (False, True, False, False)


@pytest.mark.parametrize(
    ("family", "keys", "experts"),
    [
        ("mixtral", {"num_local_experts": 6}, 6),
        ("mixtral", {"num_local_experts": 6, "num_experts": 6}, 6),
        ("qwen2_moe", {"num_experts": 6}, 6),
        ("qwen3_moe", {"num_experts": 6}, 6),
        ("qwen3_moe", {"num_local_experts": 6}, 6),
        ("qwen3_moe", {}, 128),
    ],
)
def test_number_of_experts(family: str, keys: dict[str, int], experts: int) -> None:
    config = parse_config({"model_type": family, **SMALL, **MOE, **keys})
    assert isinstance(config, MoeConfig)
    assert config.num_experts == experts


# ---------- configs made by an exporter


def test_another_family_is_made_from_the_common_fields() -> None:
    dense = parse_config(small("mistral", sliding_window=8, bos_token_id=7, remark="kept"))
    sparse = MixtralConfig(
        **dense.common(),
        num_experts=8,
        experts_per_token=2,
        expert_intermediate_size=dense.intermediate_size,
    )
    written = sparse.to_json()
    assert written["sliding_window"] == 8
    assert written["bos_token_id"] == 7
    assert written["remark"] == "kept"
    assert parse_config(written) == sparse


def test_default_token_ids_survive_a_change_of_family() -> None:
    dense = parse_config(small("llama", num_key_value_heads=4))
    sparse = Qwen3Config(**{**dense.common(), "qk_norm": True})
    assert sparse.to_json()["bos_token_id"] == 1


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        (MixtralConfig, {"qkv_bias": True}, "mixtral has no biases on the query"),
        (MixtralConfig, {"qk_norm": True}, "mixtral has no norms of the queries and keys"),
        (MixtralConfig, {"mlp_only_layers": (1, 2)}, "experts in every layer; [1, 2] would be"),
        (MixtralConfig, {"norm_topk_prob": False}, "always divides the chosen gates"),
        (MixtralConfig, {"sliding_windows": (8, None, 8, 8)}, "same sliding window in every"),
        (MixtralConfig, {"expert_intermediate_size": 12}, "one width"),
        (MixtralConfig, {"shared_expert_intermediate_size": 12}, "has no shared expert"),
        (Qwen2MoeConfig, {}, "qwen2_moe needs a shared expert"),
        (Qwen3MoeConfig, {}, "qwen3_moe always has norms of the queries and keys"),
        (Qwen3MoeConfig, {"qk_norm": True, "qkv_bias": True}, "on all four projections or on none"),
        (Qwen3MoeConfig, {"qk_norm": True, "mlp_bias": True}, "no biases in the feed-forward"),
        (MixtralConfig, {"experts_per_token": 9}, "cannot choose that many"),
        (MixtralConfig, {"rope": RopeConfig(theta=1e4, type="linear")}, "linear needs factor"),
        (MixtralConfig, {"rope": RopeConfig(theta=1e4, factor=2.0)}, "default has no factor"),
        (MixtralConfig, {"rope": RopeConfig(theta=1e4, type="su")}, "unknown rope type"),
        (MixtralConfig, {"vocab_size": 0}, "not a usable size"),
        (MixtralConfig, {"sliding_windows": ()}, "one window (or None) for each layer"),
    ],
)
def test_a_family_says_why_it_cannot(
    family: type[MoeConfig], changes: dict[str, Any], reason: str
) -> None:
    common = parse_config(small("llama")).common()
    experts = {"num_experts": 4, "experts_per_token": 2, "expert_intermediate_size": 24}
    with pytest.raises(InputError) as caught:
        family(**{**common, **experts, **changes})
    assert reason in str(caught.value)


def test_a_llama_has_no_window_and_a_qwen2_one_size_of_it() -> None:
    llama = parse_config(small("llama"))
    with pytest.raises(InputError, match="llama has no sliding window"):
        replace(llama, sliding_windows=(8,) * 4)
    with pytest.raises(InputError, match="one size of sliding window"):
        replace(parse_config(small("qwen2")), sliding_windows=(8, 8, 9, 9))


# ---------- frequencies


def test_plain_frequencies_are_a_geometric_series() -> None:
    found = rotary_frequencies(RopeConfig(theta=81.0), 8, max_position_embeddings=9, length=99)
    assert found == pytest.approx((1, 1 / 3, 1 / 9, 1 / 27))


def test_dynamic_scaling_starts_beyond_the_maximal_length() -> None:
    rope = RopeConfig(theta=100.0, type="dynamic", factor=2.0)
    inside = rotary_frequencies(rope, 4, max_position_embeddings=10, length=10)
    beyond = rotary_frequencies(rope, 4, max_position_embeddings=10, length=20)
    assert inside == pytest.approx((1, 0.1))
    # theta * (2 * 20 / 10 - 1) ** (4 / 2) = 900
    assert beyond == pytest.approx((1, 1 / 30))


def test_attention_factor_is_yarn_s_alone() -> None:
    yarn = RopeConfig(theta=1e4, type="yarn", factor=math.e, original_max_position_embeddings=64)
    assert attention_factor(RopeConfig(theta=1e4, type="linear", factor=9.0)) == 1
    assert attention_factor(yarn) == pytest.approx(1.1)
    assert attention_factor(replace(yarn, attention_factor=2.0)) == 2
    both = replace(yarn, mscale=2.0, mscale_all_dim=1.0)
    assert attention_factor(both) == pytest.approx(1.2 / 1.1)
