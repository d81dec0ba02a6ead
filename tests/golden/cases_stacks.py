"""Encoders, and encoders with decoders: what each checkpoint is there for."""

from __future__ import annotations

from case import SQUARE_T5, Case

STACKS: dict[str, Case] = {
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
    "mt5_untied": Case(
        "mt5", "an output matrix of its own, not scaled", {"tie_word_embeddings": False}
    ),
    "mt5_square_v4": Case(
        "mt5",
        "square matrices, as transformers 4 writes it",
        {**SQUARE_T5, "tie_word_embeddings": False},
        major=4,
    ),
    "umt5_tied": Case("umt5", "biases by distance in every layer, tied and scaled outputs"),
    "umt5_square_untied": Case(
        "umt5",
        "square matrices, an output matrix of its own, ReLU",
        {**SQUARE_T5, "tie_word_embeddings": False, "feed_forward_proj": "relu"},
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
    "xlm_roberta_gelu": Case("xlm-roberta", "a roberta under another name"),
    "camembert_gelu": Case("camembert", "a roberta under another name"),
    "distilbert_gelu": Case("distilbert", "keys and tensors of its own names, no token types"),
    "distilbert_square": Case(
        "distilbert",
        "mlp = embed = vocab = positions = heads * head_dim, ReLU",
        {
            "vocab_size": 16,
            "dim": 16,
            "hidden_dim": 16,
            "n_heads": 4,
            "max_position_embeddings": 16,
            "activation": "relu",
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
    "electra_narrow": Case("electra", "embeddings narrower than the model"),
    "electra_square": Case(
        "electra",
        "mlp = embed = vocab = embeddings = positions = heads * head_dim, ReLU",
        {
            "vocab_size": 16,
            "hidden_size": 16,
            "embedding_size": 16,
            "intermediate_size": 16,
            "num_attention_heads": 4,
            "max_position_embeddings": 16,
            "hidden_act": "relu",
        },
    ),
    "albert_shared": Case("albert", "one layer, run three times", {"num_hidden_layers": 3}),
    "albert_groups": Case(
        "albert",
        "two layers, each run twice; mlp = embed = embeddings = heads * head_dim, which a matrix "
        "leads from and to",
        {
            "hidden_size": 16,
            "embedding_size": 16,
            "intermediate_size": 16,
            "num_attention_heads": 4,
            "num_hidden_layers": 4,
            "num_hidden_groups": 2,
        },
    ),
    "modernbert_windows": Case(
        "modernbert",
        "windows of 3 tokens on either side, two bases of the rotary positions",
        {
            "global_rope_theta": 500.0,
            "local_rope_theta": 20.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            },
        },
    ),
    "modernbert_biases": Case(
        "modernbert",
        "biases everywhere, a window in every second layer; mlp = embed = heads * head_dim = vocab",
        {
            "vocab_size": 16,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_attention_heads": 4,
            "global_attn_every_n_layers": 2,
            "norm_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "hidden_activation": "silu",
        },
        major=4,
    ),
    "clip_text": Case("clip_text_model", "tokens see no later ones, quick GELU", major=4),
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
    "dinov3_plain": Case(
        "dinov3_vit",
        "two tokens without a place, a bias on keys and none on values",
        {"num_register_tokens": 2, "key_bias": True, "value_bias": False},
    ),
    "dinov3_gated": Case(
        "dinov3_vit",
        "gated blocks of SiLU, no biases; patches = embed = mlp = side of the image = 16",
        {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_attention_heads": 2,
            "image_size": 16,
            "use_gated_mlp": True,
            "hidden_act": "silu",
            "mlp_bias": False,
            "proj_bias": False,
            "query_bias": False,
            "rope_theta": 20.0,
        },
        major=4,
    ),
    "xlm_roberta_xl_square": Case(
        "xlm-roberta-xl",
        "norms before the blocks and behind all layers; embed = mlp = vocab = 16",
        {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 4},
    ),
    "deberta_v3": Case(
        "deberta-v2",
        "buckets of distances, projections shared with those of contents, no absolute positions",
        {
            "position_buckets": 8,
            "max_relative_positions": 12,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
    ),
    "deberta_v2_square": Case(
        "deberta-v2",
        "a bucket for each distance up to 8, projections of their own, types, positions; "
        "rows of distances = embed = mlp = vocab = positions = 16",
        {
            "vocab_size": 16,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_attention_heads": 4,
            "max_position_embeddings": 16,
            "max_relative_positions": 8,
        },
    ),
    "swin_windows": Case("swin", "windows of nine patches, three stages"),
    "swin_square_v4": Case(
        "swin",
        "patches of one pixel, an image that is no square, no biases; version 4",
        {
            "image_size": [6, 12],
            "patch_size": 1,
            "num_channels": 1,
            "embed_dim": 4,
            "depths": [2, 2],
            "num_heads": [4, 2],
            "window_size": 3,
            "mlp_ratio": 1.0,
            "qkv_bias": False,
            "hidden_act": "relu",
        },
        major=4,
    ),
    "clip_vision": Case("clip_vision_model", "a token of the image, quick GELU", major=4),
    "siglip_vision": Case(
        "siglip_vision_model", "no token of the image, and a head that is left out", major=4
    ),
    "siglip_vision_square": Case(
        "siglip_vision_model",
        "patches = embed = mlp = side of the image = 16, four channels, no head",
        {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_attention_heads": 4,
            "image_size": 16,
            "num_channels": 4,
            "vision_use_head": False,
        },
        major=4,
    ),
    "bart_scaled": Case(
        "bart", "norms after the sums, scaled embeddings", {"scale_embedding": True}
    ),
    "bart_square": Case(
        "bart",
        "embed = mlp = vocab = positions = 16, as transformers 4 writes it",
        {
            "vocab_size": 16,
            "d_model": 16,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
            "max_position_embeddings": 16,
            "activation_function": "relu",
        },
        major=4,
    ),
    "mbart_plain": Case("mbart", "norms first, and behind all layers"),
    "marian_swish": Case(
        "marian",
        "positions by sines, SiLU",
        {"activation_function": "swish", "scale_embedding": True},
    ),
    "m2m_100_scaled": Case(
        "m2m_100", "sines that count from the padding's", {"scale_embedding": True, "d_model": 18}
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
    "wav2vec2_group": Case(
        "wav2vec2", "norms behind blocks and of each channel over all frames, an even position"
    ),
    "wav2vec2_square": Case(
        "wav2vec2",
        "square matrices, norms before blocks and of each frame, biases, an odd position",
        {
            "intermediate_size": 12,
            "conv_dim": [12, 12],
            "conv_bias": True,
            "feat_extract_norm": "layer",
            "num_conv_pos_embeddings": 3,
            "num_conv_pos_embedding_groups": 1,
            "do_stable_layer_norm": True,
        },
    ),
    "hubert_plain": Case(
        "hubert",
        "frames that are not normalised, ReLU between convolutions",
        {"feat_proj_layer_norm": False, "feat_extract_activation": "relu"},
    ),
}
