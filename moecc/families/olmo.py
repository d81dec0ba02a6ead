"""olmo2, olmoe and flex_olmo: norms over all heads of queries and keys together."""

from __future__ import annotations

from moecc.families.config import EngineReading, GgufFacts, config_class
from moecc.families.decoder import ATTENTION_BIASES, DEFAULTS, DecoderConfig
from moecc.families.mixture import MOE_DEFAULTS, ONE_WIDTH, TRANSFORMERS, MoeConfig
from moecc.support.untyped import JsonDict


@config_class
class Olmo2Config(DecoderConfig):
    """An olmo2: what a block adds is normalised, what it reads is not."""

    model_type = "olmo2"
    architecture = "Olmo2ForCausalLM"
    fixed = {"qk_norm": True, "qk_norm_across": True, "norm_placement": "after"}
    options = ATTENTION_BIASES
    gguf = GgufFacts("olmo2", needs_head=True)
    defaults = {
        **DEFAULTS,
        "vocab_size": 50_304,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 1,
        "eos_token_id": 50_279,
    }

    def _write_rope(self) -> JsonDict:
        keys = super()._write_rope()
        if self.rope.type in ("linear", "dynamic"):
            # Version 4 takes the scalings that it knows by their older name.
            keys["rope_scaling"] = {"type": self.rope.type, "factor": self.rope.factor}
        return keys


@config_class
class OlmoeConfig(MoeConfig):
    """An olmoe: experts in every layer, norms before each block; `clip_qkv` is not supported."""

    model_type = "olmoe"
    architecture = "OlmoeForCausalLM"
    fixed = {"qk_norm": True, "qk_norm_across": True}
    options = ATTENTION_BIASES
    keys = ONE_WIDTH
    experts_keys = ("num_experts",)
    sparse_style = "all"
    gguf = GgufFacts("olmoe", has_groups=False, needs_head=True, renormalises=False)
    engines = {
        **TRANSFORMERS,
        "vLLM": EngineReading(
            ("plain heads",),
            ("no attention biases", "not renormalised", "untied", "epsilon 1e-5", "silu"),
        ),
        "SGLang": EngineReading(
            ("plain heads",), ("no attention biases", "not renormalised", "untied", "silu")
        ),
        "mlx-lm": EngineReading(silent=("usual rope factor", "silu")),
    }
    defaults = {
        **MOE_DEFAULTS,
        "vocab_size": 50_304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 8,
        "num_experts": 64,
        "router_aux_loss_coef": 0.01,
        "pad_token_id": 1,
        "eos_token_id": 50_279,
    }


@config_class
class FlexOlmoConfig(MoeConfig):
    """A flex_olmo: the mixture of experts of an olmo2, whose norms come after each block."""

    # vLLM has it through its backend for models of transformers, which was not looked at.
    model_type = "flex_olmo"
    architecture = "FlexOlmoForCausalLM"
    fixed = Olmo2Config.fixed
    options = ATTENTION_BIASES
    keys = ONE_WIDTH
    experts_keys = ("num_experts",)
    sparse_style = "all"
    defaults = {
        **MOE_DEFAULTS,
        "vocab_size": 100_352,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        "rope_theta": 500_000.0,
        "num_experts_per_tok": 5,
        "num_experts": 7,
        "router_aux_loss_coef": 0.01,
        "pad_token_id": 100_277,
        "eos_token_id": 100_257,
    }
