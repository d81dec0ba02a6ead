"""What transformers makes of configs: run by an interpreter that has it, not by pytest.

Reads a JSON list of configs from standard input and writes, for each, the values that its model
classes would use, in moecc's words.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import transformers
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

MAJOR = int(transformers.__version__.split(".")[0])
BIASES = {
    "llama": lambda c: (c.attention_bias, c.attention_bias, c.mlp_bias),
    "mistral": lambda c: (False, False, False),
    "mixtral": lambda c: (False, False, False),
    "qwen2": lambda c: (True, False, False),
    "qwen2_moe": lambda c: (c.qkv_bias, False, False),
    "qwen3": lambda c: (c.attention_bias, c.attention_bias, False),
    "qwen3_moe": lambda c: (c.attention_bias, c.attention_bias, False),
    "olmo2": lambda c: (c.attention_bias, c.attention_bias, False),
    "granite": lambda c: (c.attention_bias, c.attention_bias, c.mlp_bias),
    "phi3": lambda c: (False, False, False),
    "smollm3": lambda c: (c.attention_bias, c.attention_bias, c.mlp_bias),
    "gemma": lambda c: (c.attention_bias, c.attention_bias, False),
    "gemma2": lambda c: (c.attention_bias, c.attention_bias, False),
    "gemma3_text": lambda c: (c.attention_bias, c.attention_bias, False),
}
FACTORS = {
    "embedding_multiplier": "embedding_multiplier",
    "residual_multiplier": "residual_multiplier",
    "logits_scaling": "logits_divisor",
    "attn_logit_softcapping": "attention_softcap",
    "final_logit_softcapping": "logit_softcap",
}


def effective(stated: dict[str, Any]) -> dict[str, Any]:
    config = AutoConfig.for_model(**stated)
    values = {name: getattr(config, name) for name in PLAIN}
    values["hidden_act"] = getattr(config, "hidden_activation", None) or config.hidden_act
    values |= {field: getattr(config, key, None) for key, field in FACTORS.items()}
    values["score_scale"] = score_scale(config)
    values["rope_layers"] = [bool(n) for n in getattr(config, "no_rope_layers", [])]
    values["head_dim"] = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    values["qkv_bias"], values["output_bias"], values["mlp_bias"] = BIASES[config.model_type](
        config
    )
    values["dtype"] = None if config.dtype is None else str(config.dtype).removeprefix("torch.")
    values["sliding_windows"] = windows(config)
    values.update(rope(config))
    if config.model_type in EXPERTS:
        values["num_experts"] = getattr(config, EXPERTS[config.model_type])
        values["experts_per_token"] = config.num_experts_per_tok
        values["sparse_layers"] = sparse_layers(config)
    return values


def score_scale(config) -> float:
    if hasattr(config, "attention_multiplier"):
        return float(config.attention_multiplier)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return float(getattr(config, "query_pre_attn_scalar", width) ** -0.5)


def windows(config) -> list[int | None]:
    layers = config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    if config.model_type in ("llama", "olmo2", "granite", "gemma"):
        return [None] * layers
    if config.model_type in ("mistral", "mixtral", "qwen3_moe", "phi3"):
        return [window] * layers
    if config.model_type == "qwen2_moe" and MAJOR == 4:
        return [window if config.use_sliding_window else None] * layers
    return [window if kind == "sliding_attention" else None for kind in config.layer_types]


def rope(config) -> dict[str, Any]:
    stated = config.rope_parameters if MAJOR > 4 else getattr(config, "rope_scaling", None)
    if config.model_type == "gemma3_text" and MAJOR > 4:
        local, stated = (stated[f"{kind}_attention"] for kind in ("sliding", "full"))
    kind = (stated or {}).get("rope_type") or (stated or {}).get("type", "default")
    theta = stated["rope_theta"] if MAJOR > 4 else config.rope_theta
    values = {"theta": theta, "rope_type": kind, "local_theta": None}
    if config.model_type == "gemma3_text":
        values["local_theta"] = local["rope_theta"] if MAJOR > 4 else config.rope_local_base_freq
    share = stated.get("partial_rotary_factor", 1) if MAJOR > 4 else 1
    share = share if MAJOR > 4 else getattr(config, "partial_rotary_factor", 1)
    values["rotated_dim"] = int(
        share
        * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    )
    if kind != "default":
        layer = {"layer_type": "full_attention"} if "gemma3" in config.model_type else {}
        asked = layer if MAJOR > 4 else {}
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=100, **asked)
        values |= {"frequencies": frequencies.tolist(), "attention_factor": float(factor)}
    return values


def sparse_layers(config) -> list[bool]:
    step = getattr(config, "decoder_sparse_step", 1)
    dense = getattr(config, "mlp_only_layers", [])
    return [i not in dense and (i + 1) % step == 0 for i in range(config.num_hidden_layers)]


PLAIN = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)
EXPERTS = {
    "mixtral": "num_local_experts",
    "qwen2_moe": "num_experts",
    "qwen3_moe": "num_experts",
}

if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    json.dump([effective(stated) for stated in json.load(sys.stdin)], sys.stdout)
