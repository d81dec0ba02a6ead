"""glm, glm4 and glm4_moe: part of a head is rotated, in the dense ones by neighbours."""

from __future__ import annotations

from moecc.families.config import EngineReading, GgufFacts, TensorNames, config_class
from moecc.families.decoder import DEFAULTS, DecoderConfig
from moecc.families.mixture import MOE_DEFAULTS, TRANSFORMERS, MoeConfig
from moecc.families.reader import COUNT, Reader
from moecc.support.untyped import JsonDict


@config_class
class GlmConfig(DecoderConfig):
    """A glm: gate and up in one matrix, biases on queries, keys and values."""

    model_type = "glm"
    architecture = "GlmForCausalLM"
    options = frozenset({"qkv_bias", "rotary_dim"})
    strict = ("num_key_value_heads", "head_dim")
    names = TensorNames(gate_up="gate_up_proj", pairs_neighbours=True)
    defaults = {
        **DEFAULTS,
        "vocab_size": 151_552,
        "hidden_size": 4096,
        "intermediate_size": 13_696,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1.5625e-07,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
        "pad_token_id": 151_329,
        "eos_token_id": [151_329, 151_336, 151_338],
    }


@config_class
class Glm4Config(GlmConfig):
    """A glm4: norms around each block."""

    model_type = "glm4"
    architecture = "Glm4ForCausalLM"
    fixed = {"norm_placement": "around"}
    gguf = GgufFacts("glm4")
    names = TensorNames(
        gate_up="gate_up_proj",
        pairs_neighbours=True,
        layer_norms=(
            "input_layernorm",
            "post_self_attn_layernorm",
            "post_attention_layernorm",
            "post_mlp_layernorm",
        ),
    )


@config_class
class Glm4MoeConfig(MoeConfig):
    """A glm4_moe: attention of a llama, a qwen2 or a qwen3, and the experts of DeepSeek-V3."""

    model_type = "glm4_moe"
    architecture = "Glm4MoeForCausalLM"
    options = frozenset({"qkv_bias", "qk_norm", "rotary_dim"})
    keys = {
        "qk_norm": "use_qk_norm",
        "gate_scale": "routed_scaling_factor",
        # transformers has no balance loss for the family.
        "router_aux_loss_coef": "",
    }
    # No layers predict further tokens; the two versions of transformers count them by two keys.
    idle = ("num_nextn_predict_layers", "num_mtp_layers")
    always = {"n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0, "num_mtp_layers": 0}
    strict = ("num_key_value_heads",)
    experts_keys = ("n_routed_experts",)
    sparse_style = "leading"
    score = "sigmoid"
    has_shared_expert = True
    shared_count_key = "n_shared_experts"
    shared_gate = False
    has_routing_bias = True
    has_further_layers = True
    upcycle_options = "top-k=2 gates=sigmoid-renormalised shared=0.5 shared-gate=none"
    names = TensorNames(shared="shared_experts.")
    gguf = GgufFacts(
        "glm4moe",
        output_bias=True,
        ffn_norm="post_attention_norm",
        keys=(
            ("leading_dense_block_count", "first_k_dense_replace"),
            ("expert_weights_scale", "routed_scaling_factor"),
            ("expert_weights_norm", "norm_topk_prob"),
        ),
        # Scores are sigmoids.
        fixed=(("expert_gating_func", 2),),
        renormalises=None,
    )
    engines = {
        **TRANSFORMERS,
        "vLLM": EngineReading(("silu",), ("untied",)),
        "SGLang": EngineReading(("silu",), ("untied",)),
        "mlx-lm": EngineReading(("untied",), ("plain rope", "silu", "several choices")),
    }
    defaults = {
        **{k: v for k, v in MOE_DEFAULTS.items() if k != "router_aux_loss_coef"},
        "vocab_size": 151_552,
        "hidden_size": 4096,
        "intermediate_size": 10_944,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "moe_intermediate_size": 1408,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "use_qk_norm": False,
        "num_nextn_predict_layers": 1,
    }

    norm_topk_prob: bool = True

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        groups, chosen = reader.size("n_group", COUNT), reader.size("topk_group", COUNT)
        if groups != chosen:
            fault = "moecc does not restrict a token to some groups of experts"
            reader.refuse("topk_group", fault, expected=f"n_group = {groups}, or both 1")
        return super()._read(reader)
