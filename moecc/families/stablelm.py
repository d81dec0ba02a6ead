"""stablelm: layer norms, part of each head rotated, blocks side by side or one after the other."""

from __future__ import annotations

from moecc.families.config import TensorNames, config_class
from moecc.families.decoder import DEFAULTS, DecoderConfig


@config_class
class StableLmConfig(DecoderConfig):
    """A stablelm; norms of queries and keys have a scale for each head, and no bias."""

    model_type = "stablelm"
    architecture = "StableLmForCausalLM"
    fixed = {"norm_kind": "layer", "qk_norm_each": True}
    options = frozenset({"qkv_bias", "qk_norm", "parallel", "rotary_dim"})
    keys = {
        "rms_norm_eps": "layer_norm_eps",
        "qkv_bias": "use_qkv_bias",
        "qk_norm": "qk_layernorm",
        "parallel": "use_parallel_residual",
    }
    plain_heads = "stablelm has heads of hidden_size / num_attention_heads"
    names = TensorNames(query_norm="q_layernorm.norms.{head}", key_norm="k_layernorm.norms.{head}")
    defaults = {
        **DEFAULTS,
        "vocab_size": 50_304,
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.25,
        "use_qkv_bias": False,
        "qk_layernorm": False,
        "use_parallel_residual": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
