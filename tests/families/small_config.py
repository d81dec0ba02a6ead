"""Small configs in the keys of a family, and golden checkpoints of each family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moecc.errors import InputError
from moecc.families.llama import MixtralConfig
from moecc.families.qwen import Qwen2MoeConfig, Qwen3MoeConfig
from moecc.families.registry import CONFIGS, parse_config

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
OF_EACH_FAMILY: dict[str, str] = {
    json.loads((GOLDEN / case / "config.json").read_text())["model_type"]: case for case in CASES
}
"""The last golden checkpoint of each family."""
SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "stablelm": {"partial_rotary_factor": 0.5},
    "helium": {"head_dim": 4},
    "granitemoehybrid": {
        "num_local_experts": 0,
        "layer_types": ["attention"] * 4,
        "position_embedding_type": "rope",
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {"num_key_value_heads": 4},
    "kimi_k2": {"num_key_value_heads": 4},
    "gptj": {"n_embd": 16, "n_head": 4, "n_layer": 4, "n_positions": 64, "rotary_dim": 2},
}
"""What a family needs beside SMALL, or instead of it."""
MOE: dict[str, Any] = {"num_experts_per_tok": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0}
MOE_CLASSES = {MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig}


def small(family: str, **keys) -> dict[str, Any]:
    """Return a config of a family, with four experts where it has some."""
    experts = {"mixtral": "num_local_experts", "qwen2_moe": "num_experts"}
    moe = {experts.get(family, "num_experts"): 4, **MOE} if CONFIGS[family] in MOE_CLASSES else {}
    shape = {
        k: v for k, v in SMALL.items() if family != "gptj" or k in ("vocab_size", "pad_token_id")
    }
    return {"model_type": family, **shape, **OF_FAMILY.get(family, {}), **moe, **keys}


def refusal(data) -> InputError:
    """Return the error with which a config is refused."""
    with pytest.raises(InputError) as caught:
        parse_config(data)
    return caught.value
