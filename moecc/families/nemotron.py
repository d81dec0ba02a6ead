"""nemotron, arcee, starcoder2 and apertus: a feed-forward block of two matrices, without a gate."""

from __future__ import annotations

from moecc.families.config import GgufFacts, TensorNames, choice, config_class
from moecc.families.decoder import ATTENTION_BIASES, BIASES, DEFAULTS, XIELU, DecoderConfig
from moecc.families.reader import Reader
from moecc.families.rope import ROPE_KEYS
from moecc.support.untyped import JsonDict


@config_class
class NemotronConfig(DecoderConfig):
    """A nemotron: layer norms whose scale is stored less one, part of each head rotated."""

    model_type = "nemotron"
    architecture = "NemotronForCausalLM"
    fixed = {"norm_kind": "layer", "norm_offset": True, "gated_mlp": False}
    options = BIASES | {"rotary_dim"}
    keys = {"rms_norm_eps": "norm_eps"}
    gguf = GgufFacts("nemotron", output_bias=True, mlp_bias=True, fills_width=True, needs_head=True)
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
    gguf = GgufFacts(
        "starcoder2",
        output_bias=True,
        mlp_bias=True,
        fills_width=True,
        states=(("use_bias", True),),
    )
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


@config_class
class ApertusConfig(DecoderConfig):
    """An apertus: norms of each head of queries and keys."""

    model_type = "apertus"
    architecture = "ApertusForCausalLM"
    fixed = {"gated_mlp": False, "qk_norm": True}
    options = ATTENTION_BIASES
    names = TensorNames(layer_norms=("attention_layernorm", "", "feedforward_layernorm", ""))
    defaults = {
        **DEFAULTS,
        "vocab_size": 131_072,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_key_value_heads": None,
        "hidden_act": XIELU,
        "max_position_embeddings": 65_536,
        "rms_norm_eps": 1e-5,
        "rope_theta": 12e6,
        "pad_token_id": 3,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }

    hidden_act: str = choice((XIELU,), default=XIELU)

    @classmethod
    def _read_rope(cls, reader: Reader, values: JsonDict) -> JsonDict:
        if not any(map(reader.mapping, ROPE_KEYS[1:])):
            theta = reader.value("rope_theta")
            if reader.has("rope_scaling") or theta != cls.defaults["rope_theta"]:
                fault = "transformers 5 takes its own scaling and base period where it is missing"
                reader.refuse("rope_parameters", fault, expected="the rotary parameters")
            usual = {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
            reader = reader.with_data({**reader.data, "rope_scaling": usual})
        return super()._read_rope(reader, values)
