"""Decoders of further families: what each checkpoint is there for."""

from __future__ import annotations

from case import (
    DELTA,
    GRANITE,
    LLAMA3,
    SQUARE,
    SQUARE_DELTA,
    TWO_WIDE_HEADS,
    WIDE_HEADS,
    YARN,
    Case,
)

NEIGHBOURS: dict[str, object] = {"head_dim": 8, "attention_bias": True}
"""Heads of which 4 of 8 entries are rotated, and biases that are turned with them."""

HYBRID: dict[str, object] = {
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "shared_intermediate_size": 20,
    "layer_types": ["attention", "attention"],
    "mamba_n_heads": 4,
}
"""A hybrid without Mamba or experts."""

KIND_TYPED = ["sliding_attention", "full_attention", "sliding_attention"]


def by_kind(**full: object) -> dict[str, object]:
    """Return rotary parameters of either kind of layer, those with a window not scaled."""
    local = {"rope_type": "default", "rope_theta": 500.0}
    return {"full_attention": {**local, **full}, "sliding_attention": local}


DECODERS: dict[str, Case] = {
    "olmo_clipped": Case(
        "olmo",
        "norms without parameters, bounds that are in force, attention biases, tied",
        {"attention_bias": True, "clip_qkv": 0.7, "tie_word_embeddings": True},
    ),
    "olmo_square": Case("olmo", "square matrices", SQUARE),
    "olmo3_yarn": Case(
        "olmo3",
        "YaRN in layers without a window, a window of 4 in the two others",
        {
            **WIDE_HEADS,
            "num_hidden_layers": 3,
            "layer_types": KIND_TYPED,
            "sliding_window": 4,
            "rope_parameters": by_kind(**YARN),
        },
    ),
    "olmo3_square": Case(
        "olmo3",
        "square matrices, tied",
        {
            **SQUARE,
            "sliding_window": 5,
            "tie_word_embeddings": True,
            "rope_parameters": by_kind(rope_type="default"),
        },
    ),
    "ernie4_5_biases": Case(
        "ernie4_5", "neighbours rotated, biases everywhere", {"use_bias": True, "head_dim": 6}
    ),
    "ernie4_5_square": Case(
        "ernie4_5", "square matrices, tied", {**SQUARE, "head_dim": 4, "tie_word_embeddings": True}
    ),
    "glm_biases": Case("glm", "half of each head rotated by neighbours, biases", NEIGHBOURS),
    "glm_square": Case(
        "glm",
        "square matrices, tied, no biases, a quarter of a head rotated",
        {
            **SQUARE,
            "head_dim": 8,
            "partial_rotary_factor": 0.25,
            "attention_bias": False,
            "tie_word_embeddings": True,
        },
    ),
    "glm4_biases": Case("glm4", "norms around each block", NEIGHBOURS),
    "glm4_square": Case(
        "glm4", "square matrices, no biases", {**SQUARE, "head_dim": 4, "attention_bias": False}
    ),
    "hunyuan_dense_alpha": Case(
        "hunyuan_v1_dense",
        "a base period by alpha, norms behind the rotation, biases",
        {
            **TWO_WIDE_HEADS,
            "head_dim": 16,
            "attention_bias": True,
            "rope_scaling": {
                "type": "dynamic",
                "alpha": 50.0,
                "factor": 1.0,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
    ),
    "hunyuan_dense_square": Case(
        "hunyuan_v1_dense",
        "square matrices, tied",
        {**SQUARE, "head_dim": 4, "tie_word_embeddings": True},
    ),
    "exaone4_window": Case(
        "exaone4",
        "no rotary positions in the one layer without a window",
        {"num_hidden_layers": 4, "sliding_window": 4},
    ),
    "exaone4_square": Case(
        "exaone4",
        "square matrices, tied, no window",
        {
            **SQUARE,
            "sliding_window": None,
            "layer_types": ["full_attention", "full_attention"],
            "tie_word_embeddings": True,
        },
    ),
    "seed_oss_biases": Case(
        "seed_oss",
        "biases of queries, keys and values, head_dim 6",
        {"attention_bias": True, "head_dim": 6},
    ),
    "seed_oss_square": Case(
        "seed_oss",
        "square matrices, tied, biases of the attention's output and of the block",
        {
            **SQUARE,
            "mlp_bias": True,
            "head_dim": 4,
            "attention_bias": False,
            "attention_out_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "helium_biases": Case(
        "helium",
        "neighbours rotated, biases but of the output",
        {
            "head_dim": 4,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "helium_square": Case(
        "helium", "square matrices, tied", {**SQUARE, "head_dim": 4, "tie_word_embeddings": True}
    ),
    "arcee_biases": Case(
        "arcee",
        "squared ReLU without a gate, biases, head_dim 6, YaRN",
        {
            **WIDE_HEADS,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_scaling": YARN,
        },
    ),
    "arcee_square": Case(
        "arcee",
        "square matrices, tied, mlp = embed",
        {**SQUARE, "head_dim": 4, "intermediate_size": 16, "tie_word_embeddings": True},
    ),
    "nemotron_biases": Case(
        "nemotron",
        "scales less one, half of each head rotated, biases",
        {"head_dim": 8, "attention_bias": True, "mlp_bias": True},
    ),
    "nemotron_square": Case(
        "nemotron",
        "square matrices, tied, whole heads rotated",
        {
            **SQUARE,
            "head_dim": 4,
            "intermediate_size": 16,
            "partial_rotary_factor": 1.0,
            "tie_word_embeddings": True,
        },
    ),
    "starcoder2_window": Case(
        "starcoder2", "biases everywhere, a window of 5", {"sliding_window": 5}
    ),
    "starcoder2_square": Case(
        "starcoder2",
        "square matrices, no biases, untied, linear scaling",
        {
            **SQUARE,
            "intermediate_size": 16,
            "use_bias": False,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
    ),
    "stablelm_parallel": Case(
        "stablelm",
        "blocks side by side, a norm for each head, biases, half of each head rotated",
        {
            **TWO_WIDE_HEADS,
            "use_parallel_residual": True,
            "qk_layernorm": True,
            "use_qkv_bias": True,
            "partial_rotary_factor": 0.5,
        },
    ),
    "stablelm_square": Case(
        "stablelm",
        "square matrices, tied, one block after the other",
        {**SQUARE, "partial_rotary_factor": 1.0, "tie_word_embeddings": True},
    ),
    "phi_norms": Case(
        "phi",
        "norms of queries and keys, half of each head rotated",
        {**TWO_WIDE_HEADS, "qk_layernorm": True, "num_hidden_layers": 3},
    ),
    "phi_square": Case(
        "phi",
        "square matrices, tied",
        {**SQUARE, "intermediate_size": 16, "tie_word_embeddings": True},
    ),
    "cohere_norms": Case(
        "cohere",
        "norms of queries and keys with a scale for each head, biases, untied",
        {"use_qk_norm": True, "attention_bias": True, "logit_scale": 0.3},
    ),
    "cohere_square": Case(
        "cohere", "square matrices, tied", {**SQUARE, "tie_word_embeddings": True}
    ),
    "cohere2_window": Case(
        "cohere2",
        "no rotary positions in the one layer without a window, biases",
        {
            "num_hidden_layers": 3,
            "layer_types": KIND_TYPED,
            "sliding_window": 4,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "cohere2_square": Case(
        "cohere2",
        "square matrices, untied, no layer with a window",
        {
            **SQUARE,
            "logit_scale": 0.5,
            "sliding_window": 5,
            "layer_types": ["full_attention", "full_attention"],
        },
    ),
    "gptj_plain": Case("gptj", "4 of 6 entries of a head rotated by neighbours"),
    "gptj_square": Case(
        "gptj",
        "square matrices, tied, whole heads rotated",
        {
            "vocab_size": 16,
            "n_embd": 16,
            "n_head": 4,
            "n_inner": 16,
            "rotary_dim": 4,
            "tie_word_embeddings": True,
        },
    ),
    "apertus_biases": Case(
        "apertus",
        "xIELU, norms of each head, biases, llama3 scaling",
        {**WIDE_HEADS, "attention_bias": True, "rope_scaling": LLAMA3},
    ),
    "apertus_square": Case(
        "apertus",
        "square matrices, tied, mlp = embed",
        {
            **SQUARE,
            "head_dim": 4,
            "intermediate_size": 16,
            "tie_word_embeddings": True,
            "rope_scaling": YARN,
        },
    ),
    "granite_hybrid_rope": Case(
        "granitemoehybrid",
        "no Mamba, no experts, rotary positions, biases, all four factors",
        {**HYBRID, **GRANITE, "attention_bias": True, "position_embedding_type": "rope"},
    ),
    "granite_hybrid_square": Case(
        "granitemoehybrid",
        "square matrices, tied, no positions",
        {**SQUARE, **HYBRID, "shared_intermediate_size": 8, "tie_word_embeddings": True},
    ),
    "falcon_groups": Case(
        "falcon",
        "two query heads a key head, a norm for either block, biases",
        {
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "falcon_square": Case(
        "falcon",
        "square matrices, one block after the other, a key head each",
        {
            "vocab_size": 16,
            "ffn_hidden_size": 16,
            "multi_query": False,
            "parallel_attn": False,
        },
    ),
    "qwen3_5_text_delta": Case(
        "qwen3_5_text",
        "delta rules around a gated attention, biases, positions in sections",
        {
            **DELTA,
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 500.0,
                "partial_rotary_factor": 0.5,
                "mrope_interleaved": True,
                "mrope_section": [1, 1, 0],
            },
        },
        not_in_4=True,
    ),
    "qwen3_5_text_square": Case(
        "qwen3_5_text",
        "square matrices, tied, whole heads rotated",
        {**SQUARE, **SQUARE_DELTA, "intermediate_size": 16},
        not_in_4=True,
    ),
    "lfm2_biases": Case(
        "lfm2",
        "convolutions of four taps around an attention, biases, a width that is adjusted",
        {
            "num_hidden_layers": 3,
            "conv_L_cache": 4,
            "conv_bias": True,
            "layer_types": ["conv", "full_attention", "conv"],
            "block_multiple_of": 6,
            "block_ffn_dim_multiplier": 1.2,
        },
    ),
    "lfm2_square": Case(
        "lfm2",
        "square matrices, tied, as many taps as layers",
        {
            **SQUARE,
            "conv_L_cache": 2,
            "intermediate_size": 16,
            "block_auto_adjust_ff_dim": False,
            "full_attn_idxs": [1],
            "tie_word_embeddings": True,
        },
    ),
    "bloom_plain": Case("bloom", "slopes of three heads, no power of two; a norm of embeddings"),
    "bloom_square": Case(
        "bloom",
        "square matrices, untied, four heads",
        {"vocab_size": 16, "hidden_size": 16, "n_head": 4, "tie_word_embeddings": False},
    ),
    "mpt_clipped": Case(
        "mpt",
        "queries, keys and values clipped, scores with a scale of their own",
        {"attn_config": {"clip_qkv": 0.75, "softmax_scale": 0.3}},
    ),
    "mpt_square": Case(
        "mpt",
        "square matrices, untied, four heads, as many positions as tokens",
        {
            "vocab_size": 16,
            "d_model": 16,
            "n_heads": 4,
            "max_seq_len": 16,
            "tie_word_embeddings": False,
        },
    ),
    "gemma3n_streams": Case(
        "gemma3n_text",
        "three streams, the second active, shared keys, neurons of their own number and sparsity, "
        "tokens without embeddings of their own for layers",
        {
            "altup_num_inputs": 3,
            "altup_active_idx": 1,
            "num_kv_shared_layers": 2,
            "intermediate_size": [24, 20, 24, 28],
            "activation_sparsity_pattern": [0.7, 0.0, 0.8, 0.0],
            "vocab_size_per_layer_input": 31,
            "rope_local_base_freq": 90.0,
        },
        not_in_4=True,  # it wants keys of layers that have none of their own
    ),
    "gemma3n_square": Case(
        "gemma3n_text",
        "heads * head_dim = mlp = inputs = rank = streams squared = vocab = embed = 16, tied",
        {
            "vocab_size": 16,
            "vocab_size_per_layer_input": 16,
            "intermediate_size": 16,
            "num_key_value_heads": 4,
            "laurel_rank": 16,
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "gemma4_inputs": Case(
        "gemma4_text",
        "embeddings of each layer's own, shared keys, twice as wide blocks where they are shared, "
        "a soft cap; of 12 pairs of a global head 3 are rotated",
        {
            "hidden_size_per_layer_input": 16,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": True,
            "vocab_size_per_layer_input": 41,
            # The last layer's scalar has a gradient by this alone: a norm comes after it.
            "rms_norm_eps": 4.0,
        },
        not_in_4=True,
    ),
    "gemma4_keys": Case(
        "gemma4_text",
        "values that are keys in layers without a window, which have a head of their own; biases",
        {
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "hidden_size_per_layer_input": 0,
            "attention_bias": True,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
                "full_attention": {
                    "rope_type": "proportional",
                    "rope_theta": 900.0,
                    "partial_rotary_factor": 0.5,
                    "factor": 2.0,
                },
            },
        },
        not_in_4=True,
    ),
    "gemma4_experts": Case(
        "gemma4_text",
        "experts beside the block of every layer",
        {
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "enable_moe_block": True,
            "num_experts": 5,
            "top_k_experts": 2,
            "moe_intermediate_size": 12,
            "hidden_size_per_layer_input": 0,
            "rms_norm_eps": 4.0,
        },
        not_in_4=True,
    ),
    "gemma4_square": Case(
        "gemma4_text",
        "experts = 2 * expert = inputs = heads * head_dim = embed = vocab = 16",
        {
            "vocab_size": 16,
            "vocab_size_per_layer_input": 16,
            "intermediate_size": 16,
            "num_key_value_heads": 4,
            "global_head_dim": 4,
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "full_attention"],
            "hidden_size_per_layer_input": 4,
            "enable_moe_block": True,
            "num_experts": 16,
            "top_k_experts": 3,
            "moe_intermediate_size": 8,
        },
        not_in_4=True,
    ),
}
