"""Small configs in the keys of a family, and golden checkpoints of each family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moecc.errors import InputError
from moecc.families.registry import parse_config

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": None,
}  # fmt: skip
FURTHER: dict[str, dict[str, Any]] = {
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
}
"""What a family needs beside SMALL, or instead of it."""

LAYERS = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
T5 = {
    "vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 4, "num_heads": 4,
    "num_decoder_layers": 4,
}  # fmt: skip
BERT = {**LAYERS, "vocab_size": 20, "max_position_embeddings": 12}
UNPADDED = {**BERT, "pad_token_id": None}
IMAGES = {**LAYERS, "image_size": 8, "patch_size": 4}
GEMMA3N = {
    **LAYERS, "vocab_size": 20, "num_key_value_heads": 2, "head_dim": 6, "num_hidden_layers": 4,
    "sliding_window": 3, "layer_types": 2 * ["sliding_attention", "full_attention"],
}  # fmt: skip
STACKS = {
    "d_model": 12, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 3, "encoder_ffn_dim": 20, "decoder_ffn_dim": 24, "vocab_size": 20,
    "pad_token_id": 0,
}  # fmt: skip
TEXTS = {**STACKS, "max_position_embeddings": 9}
OTHER: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("t5", "mt5", "umt5", "switch_transformers", "st_moe"), T5),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "xlm-roberta-xl", "mpnet"), BERT),
    **dict.fromkeys(("modernbert", "clip_text_model"), UNPADDED),
    **dict.fromkeys(("vit", "dinov2", "dinov3_vit"), IMAGES),
    **dict.fromkeys(("clip_vision_model", "siglip_vision_model"), IMAGES),
    **dict.fromkeys(("bart", "mbart", "m2m_100", "marian"), TEXTS),
    "gptj": {
        "vocab_size": 40, "n_embd": 16, "n_head": 4, "n_layer": 4, "n_positions": 64,
        "rotary_dim": 2, "pad_token_id": None,
    },
    "gpt2": {"vocab_size": 20, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 9},
    "gpt_neox": {**LAYERS, "vocab_size": 20, "intermediate_size": 12, "num_attention_heads": 2},
    "opt": {
        "vocab_size": 20, "hidden_size": 8, "ffn_dim": 12, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 9,
    },
    "bloom": {"vocab_size": 20, "n_embed": 12, "n_layer": 2, "num_attention_heads": 3},
    "mpt": {"vocab_size": 20, "d_model": 16, "n_layers": 2, "n_heads": 4, "max_seq_len": 9},
    "gemma3n_text": {
        **GEMMA3N, "laurel_rank": 5, "altup_num_inputs": 3, "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 2, "vocab_size_per_layer_input": 20,
    },
    "gemma4_text": {**GEMMA3N, "global_head_dim": 8},
    "camembert": {**BERT, "type_vocab_size": 1},
    "electra": {**BERT, "embedding_size": 6},
    "albert": {**BERT, "embedding_size": 16, "num_hidden_groups": 2},
    "deberta-v2": {
        **BERT, "relative_attention": True, "pos_att_type": "c2p|p2c",
        "norm_rel_ebd": "layer_norm", "max_relative_positions": 7,
    },
    "distilbert": {
        "vocab_size": 20, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4,
        "max_position_embeddings": 12,
    },
    "swin": {
        "image_size": [8, 16], "patch_size": 2, "embed_dim": 4, "depths": [2, 1],
        "num_heads": [2, 4], "window_size": 2, "mlp_ratio": 2,
    },
    "whisper": {**STACKS, "num_mel_bins": 6, "max_source_positions": 5, "max_target_positions": 9},
    "clip": {},
}  # fmt: skip
"""Families whose keys are others than those of SMALL."""

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0}


def small(family: str, **keys: Any) -> dict[str, Any]:
    """Return a config of a family."""
    sizes = OTHER[family] if family in OTHER else SMALL | FURTHER.get(family, {})
    return {"model_type": family, **sizes, **keys}


def golden_config(case: str, **keys: Any) -> dict[str, Any]:
    """Return the config of a golden checkpoint, with other keys."""
    return json.loads((GOLDEN / case / "config.json").read_text()) | keys


def golden_arrays(case: str, *names: str) -> dict[str, np.ndarray]:
    """Return inputs or outputs of a golden checkpoint."""
    return {name: np.load(GOLDEN / case / f"{name}.npy") for name in names}


def relative_error(found, expected) -> float:
    """Return the largest difference, relative to the largest number that is expected."""
    return np.abs(found - expected).max() / np.abs(expected).max()


OF_EACH_FAMILY: dict[str, str] = {golden_config(case)["model_type"]: case for case in CASES}
"""The last golden checkpoint of each family."""


def refusal(data) -> InputError:
    """Return the error with which a config is refused."""
    with pytest.raises(InputError) as caught:
        parse_config(data)
    return caught.value
