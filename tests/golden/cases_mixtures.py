"""Decoders with experts: what each checkpoint is there for."""

from __future__ import annotations

from case import (
    ERNIE,
    GLM4_MOE,
    GPT_OSS,
    MIXTRAL,
    QWEN_MOE,
    SQUARE_MIXTRAL,
    SQUARE_QWEN_MOE,
    WIDE_HEADS,
    YARN,
    Case,
)

MIXTURES: dict[str, Case] = {
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
}
