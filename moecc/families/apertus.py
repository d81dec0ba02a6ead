"""apertus: xIELU, whose parameters are learned, in a block without a gate."""

from __future__ import annotations

from moecc.families.config import TensorNames, choice, config_class
from moecc.families.decoder import ATTENTION_BIASES, DEFAULTS, XIELU, DecoderConfig
from moecc.families.reader import Reader
from moecc.families.rope import ROPE_KEYS
from moecc.support.untyped import JsonDict


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
