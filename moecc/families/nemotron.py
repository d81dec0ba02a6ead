"""nemotron and arcee: squared ReLU in a feed-forward block of two matrices."""

from __future__ import annotations

from moecc.families.config import GgufFacts, config_class
from moecc.families.decoder import BIASES, DEFAULTS, DecoderConfig


@config_class
class NemotronConfig(DecoderConfig):
    """A nemotron: layer norms whose scale is stored less one, part of each head rotated."""

    model_type = "nemotron"
    architecture = "NemotronForCausalLM"
    fixed = {"norm_kind": "layer", "norm_offset": True, "gated_mlp": False}
    options = BIASES | {"rotary_dim"}
    keys = {"rms_norm_eps": "norm_eps"}
    # transformers 4 scales no positions, whatever the config says.
    rope_types = ("default",)
    defaults = {
        **DEFAULTS,
        "vocab_size": 256_000,
        "hidden_size": 6144,
        "intermediate_size": 24_576,
        "num_attention_heads": 48,
        "num_key_value_heads": None,
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "initializer_range": 0.0134,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }


@config_class
class ArceeConfig(DecoderConfig):
    """An arcee: a llama without a gate."""

    model_type = "arcee"
    architecture = "ArceeForCausalLM"
    fixed = {"gated_mlp": False}
    options = BIASES
    gguf = GgufFacts("arcee", pairs_neighbours=True)
    defaults = {
        **DEFAULTS,
        "vocab_size": 32_000,
        "hidden_size": 2560,
        "intermediate_size": 18_432,
        "num_key_value_heads": None,
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
    }
