"""transformers reads what `to_json` writes with the values that the config holds."""

import pytest

from moecc.families.mixture import MoeConfig
from moecc.families.registry import decoders, parse_config
from moecc.families.rope import attention_factor
from tests.support.rotary_tables import rotary_frequencies

from .interpreters import ask, in_each_interpreter

pytestmark = pytest.mark.parity
PROBE = "effective_values.py"
NAMES = [
    *("llama", "mistral", "qwen2", "qwen3", "olmo2", "granite", "phi3", "smollm3"),
    *("gemma", "gemma2", "gemma3_text", "mixtral", "qwen2_moe", "qwen3_moe"),
]
"""The families whose values the probe can name; the golden logits speak for the others."""

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


VARIANTS = [
    *({"model_type": name} for name in NAMES),
    *({"model_type": name, "rope_theta": 5e5, "num_hidden_layers": 3} for name in NAMES),
    *(
        {"model_type": name, "rope_scaling": YARN, "rope_theta": 777.0}
        for name in NAMES
        if "yarn" in decoders()[name].rope_types and name != "olmo2"
    ),
    *({"model_type": name, "dtype": "bfloat16", "tie_word_embeddings": True} for name in NAMES),
    {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 3}},
    {
        "model_type": "llama",
        "rope_scaling": {"rope_type": "dynamic", "factor": 2},
        "max_position_embeddings": 50,
    },
    {
        "model_type": "mixtral",
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8,
            "low_freq_factor": 1,
            "high_freq_factor": 4,
            "original_max_position_embeddings": 128,
        },
    },
    {
        "model_type": "qwen3",
        "rope_scaling": {
            **YARN,
            "beta_fast": 8,
            "beta_slow": 0.5,
            "truncate": False,
            "mscale": 0.7,
            "mscale_all_dim": 0.2,
        },
    },
    {"model_type": "qwen2", "rope_scaling": {**YARN, "attention_factor": 1.25}},
    {"model_type": "olmo2", "rope_scaling": {"type": "linear", "factor": 2.0}},
    {
        "model_type": "phi3",
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 60,
        "sliding_window": 7,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0 + n / 9 for n in range(24)],
            "long_factor": [2.0 + n for n in range(24)],
        },
    },
    {
        "model_type": "granite",
        "embedding_multiplier": 12,
        "attention_multiplier": 0.0078125,
        "residual_multiplier": 0.22,
        "logits_scaling": 16,
    },
    {
        "model_type": "smollm3",
        "no_rope_layer_interval": 3,
        "use_sliding_window": True,
        "sliding_window": 9,
        "attention_bias": True,
    },
    {"model_type": "smollm3", "num_hidden_layers": 2, "no_rope_layers": [0, 1]},
    {"model_type": "gemma2", "query_pre_attn_scalar": 224, "final_logit_softcapping": None},
    {"model_type": "gemma3_text", "sliding_window_pattern": 2, "rope_local_base_freq": 50.0},
    {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 64},
    {"model_type": "mistral", "sliding_window": None, "num_key_value_heads": None},
    {"model_type": "mixtral", "sliding_window": 77, "num_local_experts": 5, "head_dim": 96},
    {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 30,
    },
    {
        "model_type": "qwen3",
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    {"model_type": "qwen3_moe", "use_sliding_window": True, "attention_bias": True},
    {"model_type": "qwen3_moe", "num_local_experts": 16, "decoder_sparse_step": 2},
    {"model_type": "qwen3_moe", "num_experts": 16, "mlp_only_layers": [0, 5], "head_dim": 128},
    {"model_type": "qwen2_moe", "num_experts": 7, "qkv_bias": False, "norm_topk_prob": True},
    {
        "model_type": "qwen2_moe",
        "num_hidden_layers": 2,
        "use_sliding_window": True,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "sliding_attention"],
    },
]


@in_each_interpreter
def test_transformers_takes_the_values_that_the_config_holds(python):
    configs = [parse_config(variant) for variant in VARIANTS]
    for config, found in zip(
        configs, ask(python, PROBE, [c.to_json() for c in configs]), strict=True
    ):
        assert found == {**expected(config), **close(config, found)}


@in_each_interpreter
def test_defaults_are_those_of_the_classes(python):
    for name, found in zip(
        NAMES, ask(python, PROBE, [{"model_type": n} for n in NAMES]), strict=True
    ):
        config = parse_config({"model_type": name})
        assert found == {**expected(config), **close(config, found)}


def expected(config):
    names = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
        *("rms_norm_eps", "hidden_act", "tie_word_embeddings", "head_dim", "dtype"),
        *("qkv_bias", "output_bias", "mlp_bias"),
    )
    values = {name: getattr(config, name) for name in names}
    values["sliding_windows"] = list(config.sliding_windows)
    if config.model_type in ("gemma2", "gemma3_text") and not any(values["sliding_windows"]):
        # The number is stated, and no layer has it.
        values["sliding_windows"] = [None] * config.num_hidden_layers
    values |= {"score_scale": config.score_scale, "rotated_dim": config.rotated_dim}
    granite = config.model_type == "granite"
    for name in ("embedding_multiplier", "residual_multiplier", "logits_divisor"):
        values[name] = getattr(config, name) if granite else None
    for name in ("attention_softcap", "logit_softcap"):
        values[name] = getattr(config, name)
    rotary = config.rope_layers or [True] * config.num_hidden_layers
    values["rope_layers"] = list(rotary) if config.model_type == "smollm3" else []
    local = (config.local_rope or config.rope).theta
    values["local_theta"] = local if config.model_type == "gemma3_text" else None
    values |= {"theta": config.rope.theta, "rope_type": config.rope.type}
    if isinstance(config, MoeConfig):
        values["num_experts"] = config.num_experts
        values["experts_per_token"] = config.experts_per_token
        values["sparse_layers"] = list(config.sparse_layers)
    return values


def close(config, found):
    """Return the rotary table that was found, if it is ours up to float32's rounding."""
    if config.rope.type == "default":
        return {}
    length = config.max_position_embeddings
    ours = rotary_frequencies(
        config.rope, config.rotated_dim, max_position_embeddings=length, length=100
    )
    assert found["frequencies"] == pytest.approx(ours, rel=2e-6)
    assert found["attention_factor"] == pytest.approx(attention_factor(config.rope), rel=1e-12)
    return {key: found[key] for key in ("frequencies", "attention_factor")}
