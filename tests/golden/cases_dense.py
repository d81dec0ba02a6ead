"""Dense decoders: what each checkpoint is there for."""

from __future__ import annotations

from case import GEMMA3_LAYERS, GRANITE, LLAMA3, SQUARE, TWO_WIDE_HEADS, WIDE_HEADS, YARN, Case

DENSE: dict[str, Case] = {
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
    "opt_plain": Case("opt", "positions from the third row on, ReLU", {"num_hidden_layers": 3}),
    "opt_after_narrow": Case(
        "opt",
        "norms after the sums, embeddings narrower than the model",
        {"do_layer_norm_before": False, "word_embed_proj_dim": 8},
    ),
    "opt_square": Case(
        "opt",
        "mlp = embed = vocab = positions = 16, GELU, untied",
        {
            "vocab_size": 16,
            "hidden_size": 16,
            "ffn_dim": 16,
            "num_attention_heads": 4,
            "max_position_embeddings": 16,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
        },
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
}
