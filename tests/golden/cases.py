"""The tiny checkpoints that golden logits are made of: what each is, and what it is there for.

Sizes are chosen so that a wrong reading shows: periods short enough that every rotary scaling
changes the first 16 positions, windows shorter than the sequence, and in the `square` cases equal
sizes for axes that must not be confused.
"""

from __future__ import annotations

from dataclasses import dataclass, field

SMALL: dict[str, object] = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE_HEADS: dict[str, object] = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
"""Heads of width 16, whose eight frequencies fall on all sides of a scaling's borders."""

SQUARE: dict[str, object] = {
    "vocab_size": 16,
    "intermediate_size": 8,
    "num_key_value_heads": 4,
}
"""2 * mlp = heads * head_dim = vocab = embed = 16."""

MIXTRAL: dict[str, object] = {"num_experts_per_tok": 2, "intermediate_size": 20}
QWEN_MOE: dict[str, object] = {**MIXTRAL, "moe_intermediate_size": 12}

SQUARE_MIXTRAL: dict[str, object] = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
"""experts = 2 * mlp = heads * head_dim = vocab = embed = 8 (the experts are added per family)."""

SQUARE_QWEN_MOE: dict[str, object] = {**SQUARE_MIXTRAL, "moe_intermediate_size": 4}

GLM4_MOE: dict[str, object] = {
    **QWEN_MOE,
    "n_routed_experts": 5,
    "first_k_dense_replace": 0,
    "head_dim": 8,
}
ERNIE: dict[str, object] = {
    "moe_intermediate_size": 12,
    "moe_num_experts": 5,
    "moe_k": 2,
    "moe_num_shared_experts": 1,
    "pad_token_id": None,
}

GPT_OSS: dict[str, object] = {
    **MIXTRAL,
    "head_dim": 8,
    "pad_token_id": None,
    "rope_scaling": None,
}

T5: dict[str, object] = {
    "vocab_size": 37,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 20,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
"""Stacks of different depth, heads that do not fill the width, distances beyond the last bucket."""

BERT: dict[str, object] = {
    "vocab_size": 37,
    "hidden_size": 18,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 24,
    "type_vocab_size": 3,
}
SQUARE_T5: dict[str, object] = {
    "vocab_size": 16,
    "d_kv": 4,
    "num_heads": 4,
    "d_ff": 16,
    "relative_attention_num_buckets": 4,
    "num_decoder_layers": 2,
}
"""heads * d_kv = d_ff = vocab = d_model = 16, and as many buckets as heads."""

NO_PADDING: dict[str, object] = {**SMALL, "pad_token_id": None}
"""For families whose padding token is beyond so small a vocabulary."""

TWO_WIDE_HEADS: dict[str, object] = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
"""Heads of width 16 that fill the model's width."""

GPT2: dict[str, object] = {
    "vocab_size": 37,
    "n_embd": 12,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 24,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT_NEOX: dict[str, object] = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
}

ROBERTA: dict[str, object] = {**BERT, "pad_token_id": 1, "type_vocab_size": 1}
IMAGES: dict[str, object] = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 12,
    "patch_size": 4,
}
"""Nine patches, of 4 by 4 places and 3 channels."""

WHISPER: dict[str, object] = {
    "vocab_size": 37,
    "d_model": 12,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 16,
    "num_mel_bins": 5,
    "max_source_positions": 7,
    "max_target_positions": 14,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}

BASES = {
    "roberta": ROBERTA,
    "mpnet": {**ROBERTA, "type_vocab_size": 2},
    "vit": IMAGES,
    "dinov2": IMAGES,
    "whisper": WHISPER,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "t5": T5,
    "switch_transformers": T5,
    "bert": BERT,
    **dict.fromkeys(
        ("olmo2", "granite", "phi3", "smollm3", "gemma", "gemma2", "gemma3_text"), NO_PADDING
    ),
}


ENCODERS = ("bert", "roberta", "mpnet", "vit", "dinov2")


@dataclass(frozen=True)
class Case:
    """One checkpoint: a family, the keys that differ from SMALL, and how it is stored."""

    family: str
    why: str
    keys: dict[str, object] = field(default_factory=dict)
    dtype: str = "float32"
    shard_bytes: int | None = None
    major: int = 5
    not_in_4: bool = False
    """Whether transformers 4 does not read it, or reads another function."""

    def config(self) -> dict[str, object]:
        """Return the keyword arguments of the config class, in the spelling of version 4."""
        return {**BASES.get(self.family, SMALL), **self.keys}

    @property
    def output(self) -> str:
        """What the model returns: ``logits``, or of an encoder alone its ``hidden`` states."""
        return "hidden" if self.family in ENCODERS else "logits"

    @property
    def decodes(self) -> bool:
        """Whether the model is an encoder-decoder, with tokens for the decoder."""
        return self.family in ("t5", "switch_transformers", "whisper")

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the model's inputs."""
        first = {"vit": "pixels", "dinov2": "pixels", "whisper": "features"}
        name = first.get(self.family, "tokens")
        return (name, "decoder_tokens") if self.decodes else (name,)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

GRANITE: dict[str, object] = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.22,
    "logits_scaling": 6.0,
}
GEMMA3_LAYERS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]

CASES: dict[str, Case] = {
    "llama_gqa": Case(
        "llama", "two query heads a key-value head, three layers", {"num_hidden_layers": 3}
    ),
    "llama_square_tied": Case(
        "llama", "square matrices, tied embeddings", {**SQUARE, "tie_word_embeddings": True}
    ),
    "llama_square_mlp": Case(
        "llama", "mlp = embed, untied square head", {**SQUARE, "intermediate_size": 16}
    ),
    "llama_biases_head_dim": Case(
        "llama",
        "biases on every projection, head_dim 6 where hidden / heads is 4",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 6},
    ),
    "llama_gelu_mqa": Case(
        "llama",
        "tanh GELU, one key-value head",
        {"hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 1},
    ),
    "llama_linear": Case(
        "llama",
        "linear rotary scaling",
        {**WIDE_HEADS, "rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    ),
    "llama_dynamic": Case(
        "llama",
        "dynamic rotary scaling, in force because 16 tokens exceed 6 positions",
        {
            **WIDE_HEADS,
            "max_position_embeddings": 6,
            "rope_scaling": {"rope_type": "dynamic", "factor": 3.0},
        },
    ),
    "llama_llama3": Case(
        "llama",
        "llama3 rotary scaling, frequencies in all three bands",
        {**WIDE_HEADS, "rope_scaling": LLAMA3},
    ),
    "llama_yarn": Case(
        "llama", "YaRN with its default attention factor", {**WIDE_HEADS, "rope_scaling": YARN}
    ),
    "llama_yarn_options": Case(
        "llama",
        "YaRN with a stated attention factor, other betas, no rounding of the range",
        {
            **WIDE_HEADS,
            "rope_scaling": {
                **YARN,
                "attention_factor": 1.3,
                "beta_fast": 4.0,
                "beta_slow": 0.5,
                "truncate": False,
            },
        },
    ),
    "llama_yarn_mscale": Case(
        "llama",
        "YaRN whose attention factor is a ratio of two mscales",
        {**WIDE_HEADS, "rope_scaling": {**YARN, "mscale": 0.8, "mscale_all_dim": 0.3}},
    ),
    "llama_bfloat16": Case("llama", "stored as bfloat16", dtype="bfloat16"),
    "llama_sharded": Case("llama", "several shards and an index", shard_bytes=6000),
    "llama_v4": Case(
        "llama",
        "config in the spelling of transformers 4, llama3 scaling",
        {**WIDE_HEADS, "rope_scaling": LLAMA3},
        major=4,
    ),
    "mistral_window": Case(
        "mistral", "sliding window of 5", {"sliding_window": 5, "num_hidden_layers": 3}
    ),
    "mistral_full_head_dim": Case(
        "mistral",
        "no window, head_dim 6, tied embeddings",
        {"sliding_window": None, "head_dim": 6, "tie_word_embeddings": True},
    ),
    "qwen2_gqa_tied": Case(
        "qwen2", "biases on q, k and v only, tied embeddings", {"tie_word_embeddings": True}
    ),
    "qwen2_window": Case(
        "qwen2",
        "sliding window of 4 from the third of four layers upwards",
        {
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 2,
        },
    ),
    "qwen2_yarn": Case(
        "qwen2",
        "YaRN as Qwen2.5 uses it, one head as wide as embed",
        {**WIDE_HEADS, "num_attention_heads": 1, "rope_scaling": YARN},
    ),
    "qwen2_square": Case("qwen2", "square matrices", SQUARE),
    "qwen3_head_dim_tied": Case(
        "qwen3", "q and k norms, head_dim 6, tied", {"head_dim": 6, "tie_word_embeddings": True}
    ),
    "qwen3_bias_window": Case(
        "qwen3",
        "attention biases on all four projections, window of 4 in the last layer, linear scaling",
        {
            "num_hidden_layers": 3,
            "head_dim": 4,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 2,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
    ),
    "qwen3_square": Case("qwen3", "square matrices", {**SQUARE, "head_dim": 4}),
    "olmo2_gqa": Case(
        "olmo2",
        "norms after each block and over all heads, attention biases",
        {"attention_bias": True, "num_hidden_layers": 3},
    ),
    "olmo2_square_tied": Case(
        "olmo2", "square matrices, tied embeddings", {**SQUARE, "tie_word_embeddings": True}
    ),
    "granite_multipliers": Case(
        "granite",
        "all four factors, biases on every projection",
        {**GRANITE, "attention_bias": True, "mlp_bias": True},
    ),
    "granite_square_tied": Case(
        "granite", "square matrices, tied embeddings", {**SQUARE, "tie_word_embeddings": True}
    ),
    "phi3_partial_window": Case(
        "phi3",
        "12 of 16 entries of a head rotated, sliding window of 5, longrope's short divisors",
        {
            **TWO_WIDE_HEADS,
            "partial_rotary_factor": 0.75,
            "sliding_window": 5,
            "original_max_position_embeddings": 32,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
                "long_factor": [1.0, 2.0, 4.0, 6.0, 9.0, 14.0],
            },
        },
    ),
    "phi3_long_v4": Case(
        "phi3",
        "longrope's long divisors, because 16 tokens exceed 6; as transformers 4 writes it",
        {
            "original_max_position_embeddings": 6,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0, 1.5],
                "long_factor": [1.25, 4.0],
            },
        },
        major=4,
    ),
    "phi3_square": Case("phi3", "square matrices, tied", {**SQUARE, "tie_word_embeddings": True}),
    "smollm3_window": Case(
        "smollm3",
        "every second of four layers without rotary positions, and with a window of 4",
        {
            "num_hidden_layers": 4,
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 4,
        },
    ),
    "smollm3_square_tied": Case(
        "smollm3",
        "square matrices, the first of two layers without rotary positions, biases",
        {
            **SQUARE,
            "no_rope_layers": [0, 1],
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "gemma_mqa": Case(
        "gemma",
        "head_dim 6, one key-value head, tied",
        {"head_dim": 6, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "gemma_square": Case("gemma", "square matrices, untied", {**SQUARE, "head_dim": 4}),
    "gemma2_caps": Case(
        "gemma2",
        "soft caps in force, a scale of its own, a window of 4 in every second of four layers",
        {
            "num_hidden_layers": 4,
            "head_dim": 6,
            "sliding_window": 4,
            "query_pre_attn_scalar": 10,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma2_square": Case(
        "gemma2",
        "square matrices, full attention in the first of two layers, no caps",
        {
            **SQUARE,
            "head_dim": 4,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention"],
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
    ),
    "gemma3_local": Case(
        "gemma3_text",
        "every third of four layers global with linear scaling, the others local; a cap on logits",
        {
            "num_hidden_layers": 4,
            "head_dim": 8,
            "sliding_window": 4,
            "layer_types": GEMMA3_LAYERS,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            },
            "final_logit_softcapping": 5.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3_square_v4": Case(
        "gemma3_text",
        "square matrices, as transformers 4 writes it",
        {
            **SQUARE,
            "num_hidden_layers": 3,
            "head_dim": 4,
            "sliding_window": 5,
            "sliding_window_pattern": 2,
            "rope_local_base_freq": 30.0,
            "query_pre_attn_scalar": 4,
        },
        major=4,
    ),
    "gpt2_plain": Case(
        "gpt2",
        "a block of its own width, scores also divided by the layer's number",
        {"n_inner": 28, "scale_attn_by_inverse_layer_idx": True, "n_layer": 3},
    ),
    "gpt2_square": Case(
        "gpt2",
        "mlp = embed = vocab = positions = 16, untied, exact GELU",
        {
            "vocab_size": 16,
            "n_embd": 16,
            "n_head": 4,
            "n_inner": 16,
            "n_positions": 16,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
        },
    ),
    "gpt_neox_parallel": Case(
        "gpt_neox",
        "blocks side by side, 4 of 8 entries of a head rotated, linear scaling",
        {"rotary_pct": 0.5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    "gpt_neox_square": Case(
        "gpt_neox",
        "one block after the other, whole heads rotated, no attention biases, mlp = embed",
        {
            "vocab_size": 16,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_attention_heads": 4,
            "rotary_pct": 1.0,
            "rotary_emb_base": 300,
            "use_parallel_residual": False,
            "attention_bias": False,
        },
    ),
    "mixtral_gqa": Case(
        "mixtral",
        "four experts, two a token",
        {**MIXTRAL, "num_local_experts": 4, "rope_theta": 800.0},
    ),
    "mixtral_square": Case(
        "mixtral", "square matrices and as many experts", {**SQUARE_MIXTRAL, "num_local_experts": 8}
    ),
    "mixtral_window_tied": Case(
        "mixtral",
        "sliding window of 5, tied embeddings, three experts of which all are chosen",
        {
            **MIXTRAL,
            "num_local_experts": 3,
            "num_experts_per_tok": 3,
            "sliding_window": 5,
            "tie_word_embeddings": True,
        },
    ),
    "mixtral_top1_head_dim": Case(
        "mixtral",
        "one expert a token (its gate is 1), head_dim 6",
        {**MIXTRAL, "num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 6},
    ),
    "mixtral_sharded": Case(
        "mixtral",
        "experts of a layer in several shards",
        {**MIXTRAL, "num_local_experts": 4},
        shard_bytes=9000,
    ),
    "mixtral_bfloat16": Case(
        "mixtral", "stored as bfloat16", {**MIXTRAL, "num_local_experts": 4}, dtype="bfloat16"
    ),
    "mixtral_v4": Case(
        "mixtral",
        "config in the spelling of transformers 4",
        {**MIXTRAL, "num_local_experts": 4},
        major=4,
    ),
    "qwen2_moe_plain": Case(
        "qwen2_moe",
        "gates not renormalised, shared expert",
        {
            **QWEN_MOE,
            "num_experts": 4,
            "shared_expert_intermediate_size": 18,
            "norm_topk_prob": False,
        },
    ),
    "qwen2_moe_step": Case(
        "qwen2_moe",
        "experts in every second of four layers, gates renormalised",
        {
            **QWEN_MOE,
            "num_hidden_layers": 4,
            "num_experts": 5,
            "shared_expert_intermediate_size": 10,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
        },
    ),
    "qwen2_moe_dense_layers": Case(
        "qwen2_moe",
        "first of three layers dense, no biases, tied embeddings",
        {
            **QWEN_MOE,
            "num_hidden_layers": 3,
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "shared_expert_intermediate_size": 6,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
            "qkv_bias": False,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2_moe_square": Case(
        "qwen2_moe",
        "square matrices and as many experts, shared expert as wide as embed",
        {**SQUARE_QWEN_MOE, "num_experts": 8, "shared_expert_intermediate_size": 8},
    ),
    "qwen3_moe_norm": Case(
        "qwen3_moe",
        "gates renormalised, head_dim 6",
        {**QWEN_MOE, "num_experts": 4, "norm_topk_prob": True, "head_dim": 6},
    ),
    "qwen3_moe_plain": Case(
        "qwen3_moe",
        "gates not renormalised, second of three layers dense",
        {
            **QWEN_MOE,
            "num_hidden_layers": 3,
            "num_experts": 4,
            "norm_topk_prob": False,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3_moe_step": Case(
        "qwen3_moe",
        "experts in layer 3 of four (step 2, layer 1 excepted), attention biases, tied",
        {
            **QWEN_MOE,
            "num_hidden_layers": 4,
            "num_experts": 5,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [1],
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_moe_square": Case(
        "qwen3_moe",
        "square matrices and as many experts",
        {**SQUARE_QWEN_MOE, "num_experts": 8, "norm_topk_prob": True},
    ),
    "qwen3_moe_window": Case(
        "qwen3_moe",
        "window of 4 in every layer, YaRN",
        {
            **QWEN_MOE,
            **WIDE_HEADS,
            "num_experts": 4,
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 4,
            "rope_scaling": YARN,
        },
    ),
    "qwen3_moe_v4": Case(
        "qwen3_moe",
        "config in the spelling of transformers 4 (num_experts), several shards",
        {**QWEN_MOE, "num_experts": 4, "norm_topk_prob": True, "head_dim": 6},
        shard_bytes=20_000,
        major=4,
    ),
    "olmoe_norm": Case(
        "olmoe",
        "norms over all heads of queries and keys, gates renormalised",
        {**MIXTRAL, "num_experts": 4, "norm_topk_prob": True, "pad_token_id": None},
    ),
    "olmoe_heads": Case(
        "olmoe",
        "as many key-value heads as heads, gates not renormalised",
        {**MIXTRAL, "num_experts": 4, "num_key_value_heads": 4, "pad_token_id": None},
    ),
    "olmoe_square_v4": Case(
        "olmoe",
        "square matrices, gates not renormalised, attention biases, version 4",
        {
            **SQUARE_MIXTRAL,
            "num_experts": 8,
            "attention_bias": True,
            "pad_token_id": None,
        },
        major=4,
    ),
    "flex_olmo_norm": Case(
        "flex_olmo",
        "norms after each block, gates renormalised",
        {**MIXTRAL, "num_experts": 4, "norm_topk_prob": True, "pad_token_id": None},
    ),
    "flex_olmo_square_tied": Case(
        "flex_olmo",
        "square matrices, gates not renormalised, tied embeddings",
        {
            **SQUARE_MIXTRAL,
            "num_experts": 8,
            "tie_word_embeddings": True,
            "pad_token_id": None,
        },
    ),
    "granitemoe_multipliers": Case(
        "granitemoe",
        "all four factors, attention biases",
        {
            **MIXTRAL,
            "num_local_experts": 4,
            "attention_bias": True,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.4,
            "logits_scaling": 6.0,
        },
    ),
    "granitemoe_square_v4": Case(
        "granitemoe",
        "square matrices and as many experts, the usual scale of the scores, version 4",
        {**SQUARE_MIXTRAL, "num_local_experts": 8, "attention_multiplier": 0.5},
        major=4,
    ),
    "glm4_moe_dense_first": Case(
        "glm4_moe",
        "first of three layers dense, half of each head rotated, norms of queries and keys, two "
        "shared experts, a factor on the gates",
        {
            **GLM4_MOE,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "use_qk_norm": True,
            "n_shared_experts": 2,
            "routed_scaling_factor": 1.5,
        },
    ),
    "glm4_moe_square": Case(
        "glm4_moe",
        "square matrices, biases on queries, keys and values, whole heads rotated",
        {
            **SQUARE_QWEN_MOE,
            "n_routed_experts": 8,
            "first_k_dense_replace": 0,
            "attention_bias": True,
            "partial_rotary_factor": 1.0,
        },
    ),
    "glm4_moe_plain_v4": Case(
        "glm4_moe",
        "gates not renormalised, tied embeddings, version 4",
        {
            **GLM4_MOE,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
            "partial_rotary_factor": 1.0,
        },
        major=4,
    ),
    "ernie4_5_moe_range": Case(
        "ernie4_5_moe",
        "experts in layers 1 and 2 of four, two shared ones",
        {
            **ERNIE,
            "num_hidden_layers": 4,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 2,
            "moe_num_shared_experts": 2,
        },
    ),
    "ernie4_5_moe_every_second": Case(
        "ernie4_5_moe",
        "experts in every second layer up to the last, tied embeddings",
        {
            **ERNIE,
            "num_hidden_layers": 4,
            "moe_layer_start_index": 0,
            "moe_layer_interval": 2,
            "tie_word_embeddings": True,
        },
    ),
    "ernie4_5_moe_square_v4": Case(
        "ernie4_5_moe",
        "square matrices and as many experts, none shared, version 4",
        {
            **SQUARE_MIXTRAL,
            "moe_intermediate_size": 4,
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_num_shared_experts": 0,
            "moe_layer_start_index": 0,
            "pad_token_id": None,
        },
        major=4,
    ),
    "gpt_oss_limits": Case(
        "gpt_oss",
        "limits that are reached, another alpha, windows of 4 in every second layer, YaRN",
        {
            **GPT_OSS,
            "num_hidden_layers": 3,
            "num_local_experts": 4,
            "swiglu_alpha": 1.1,
            "swiglu_limit": 0.7,
            "sliding_window": 4,
            "rope_scaling": {**YARN, "truncate": False},
        },
        not_in_4=True,
    ),
    "gpt_oss_square_v4": Case(
        "gpt_oss",
        "square matrices and as many experts, tied embeddings, version 4",
        {
            **GPT_OSS,
            **SQUARE_MIXTRAL,
            "head_dim": 4,
            "num_local_experts": 8,
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 5,
            "tie_word_embeddings": True,
        },
        major=4,
    ),
    "phimoe_window": Case(
        "phimoe",
        "gates by SparseMixer, biases everywhere, window of 5, three layers",
        {
            **MIXTRAL,
            "num_hidden_layers": 3,
            "num_local_experts": 6,
            "sliding_window": 5,
            "attention_bias": True,
            "lm_head_bias": True,
        },
    ),
    "phimoe_square_v4": Case(
        "phimoe",
        "square matrices and as many experts, tied embeddings, version 4",
        {
            **SQUARE_MIXTRAL,
            "num_local_experts": 8,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
        major=4,
    ),
    "t5_relu_tied": Case("t5", "version 1.0: ReLU, tied and scaled outputs"),
    "t5_gated_untied": Case(
        "t5",
        "version 1.1: gated GELU, an output matrix of its own, not scaled",
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "t5_square": Case("t5", "square matrices", SQUARE_T5),
    "t5_bfloat16": Case("t5", "stored as bfloat16", dtype="bfloat16"),
    "t5_gated_v4": Case(
        "t5",
        "version 1.1 as transformers 4 writes it, gated SiLU",
        {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False},
        major=4,
    ),
    "switch_half": Case(
        "switch_transformers",
        "experts in every second layer of the encoder and one of three in the decoder, no drops",
        {
            "num_layers": 4,
            "num_experts": 4,
            "num_sparse_encoder_layers": 2,
            "num_sparse_decoder_layers": 1,
        },
    ),
    "switch_drops": Case(
        "switch_transformers",
        "experts in every layer, which take 3 tokens of a sequence and drop the rest",
        {
            "num_experts": 3,
            "num_sparse_encoder_layers": 2,
            "num_sparse_decoder_layers": 3,
            "expert_capacity": 3,
        },
    ),
    "switch_square_v4": Case(
        "switch_transformers",
        "square matrices and as many experts, as transformers 4 writes it",
        {
            **SQUARE_T5,
            "num_experts": 16,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "expert_capacity": 2,
        },
        major=4,
    ),
    "bert_gelu": Case("bert", "GELU, three token types of which the first is used"),
    "bert_square": Case(
        "bert",
        "mlp = embed = vocab = positions = heads * head_dim, ReLU",
        {
            "vocab_size": 16,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_attention_heads": 4,
            "max_position_embeddings": 16,
            "hidden_act": "relu",
        },
    ),
    "roberta_gelu": Case("roberta", "positions count from behind the padding token's, id 1"),
    "roberta_square": Case(
        "roberta",
        "mlp = embed = vocab = heads * head_dim, positions from 4 on, two token types",
        {
            "vocab_size": 16,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_attention_heads": 4,
            "pad_token_id": 3,
            "type_vocab_size": 2,
        },
    ),
    "mpnet_gelu": Case("mpnet", "biases by distance, shared by the layers"),
    "mpnet_square": Case(
        "mpnet",
        "mlp = embed = vocab = heads * head_dim = 32 buckets",
        {
            "vocab_size": 32,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_attention_heads": 4,
            "num_hidden_layers": 1,
        },
    ),
    "vit_plain": Case(
        "vit",
        "an image of 3 by 2 patches, no biases on queries, keys and values",
        {"qkv_bias": False, "image_size": [12, 8]},
    ),
    "vit_square": Case(
        "vit",
        "patches = embed = mlp = side of the image = 16, four channels, patches of 4",
        {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_attention_heads": 4,
            "image_size": 16,
            "num_channels": 4,
        },
    ),
    "dinov2_plain": Case(
        "dinov2",
        "scaled blocks, of twice the width",
        {"mlp_ratio": 2},
    ),
    "dinov2_gated": Case(
        "dinov2",
        "gated blocks of 16, as transformers 4 writes it",
        {"mlp_ratio": 2, "use_swiglu_ffn": True},
        major=4,
    ),
    "whisper_plain": Case("whisper", "stacks of different depth, heads and widths"),
    "whisper_square": Case(
        "whisper",
        "mel = embed = mlp = vocab = positions of either stack = 16",
        {
            "vocab_size": 16,
            "d_model": 16,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
            "num_mel_bins": 16,
            "max_source_positions": 16,
            "max_target_positions": 16,
            "decoder_layers": 2,
        },
    ),
}
