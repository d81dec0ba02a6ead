"""starcoder2: layer norms, biases everywhere, a feed-forward block of two matrices."""

from __future__ import annotations

from moecc.families.config import TensorNames, config_class
from moecc.families.decoder import BIASES, DEFAULTS, DecoderConfig


@config_class
class Starcoder2Config(DecoderConfig):
    """A starcoder2: one sliding window in every layer or in none."""

    model_type = "starcoder2"
    architecture = "Starcoder2ForCausalLM"
    fixed = {"norm_kind": "layer", "gated_mlp": False}
    options = BIASES
    keys = {"rms_norm_eps": "norm_epsilon", **dict.fromkeys(BIASES, "use_bias")}
    window_style = "uniform"
    names = TensorNames(dense_up="c_fc", dense_down="c_proj")
    defaults = {
        **DEFAULTS,
        "vocab_size": 49_152,
        "hidden_size": 3072,
        "intermediate_size": 12_288,
        "num_hidden_layers": 30,
        "num_attention_heads": 24,
        "num_key_value_heads": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 4096,
        "norm_epsilon": 1e-5,
        "sliding_window": None,
        "use_bias": True,
        "tie_word_embeddings": True,
        "initializer_range": 0.018042,
        "bos_token_id": 50_256,
        "eos_token_id": 50_256,
    }
