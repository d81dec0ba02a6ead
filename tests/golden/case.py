"""What a tiny checkpoint is, and the keys of configs that many of them share.

Sizes are chosen so that a wrong reading shows: periods short enough that every rotary scaling
changes the first 16 positions, windows shorter than the sequence, and in the `square` cases equal
sizes for axes that must not be confused.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from moecc.families.bert import BertConfig
from moecc.families.encdec import EncDecConfig
from moecc.families.registry import CONFIGS
from moecc.families.vision import VisionConfig
from moecc.families.wav2vec2 import AudioConfig
from moecc.families.whisper import TwoStackConfig, WhisperConfig

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

DELTA: dict[str, object] = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 4,
    "linear_conv_kernel_dim": 3,
    "partial_rotary_factor": 0.5,
}
"""Gated delta rules around an attention, their heads of values in pairs and of another width."""

SQUARE_DELTA: dict[str, object] = {
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "head_dim": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "linear_conv_kernel_dim": 2,
    "partial_rotary_factor": 1.0,
    "tie_word_embeddings": True,
}
LFM2_MOE: dict[str, object] = {
    **QWEN_MOE,
    "num_hidden_layers": 3,
    "num_experts": 5,
    "num_dense_layers": 1,
    "layer_types": ["conv", "full_attention", "conv"],
}
LLAMA4: dict[str, object] = {
    "intermediate_size": 12,
    "intermediate_size_mlp": 20,
    "num_hidden_layers": 4,
    "num_local_experts": 5,
    "attention_chunk_size": 5,
    "floor_scale": 3,
    "attn_scale": 0.3,
    "head_dim": 8,
}
"""Chunks and steps of the temperature shorter than a text, in three and one of four layers."""
DEEPSEEK: dict[str, object] = {
    **QWEN_MOE,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 3,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 0,
    "q_lora_rank": 10,
    "kv_lora_rank": 18,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 5,
}
"""No two sizes of the attention alike."""
SQUARE_DEEPSEEK: dict[str, object] = {
    **SQUARE_QWEN_MOE,
    "q_lora_rank": None,
    "kv_lora_rank": 4,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "n_routed_experts": 8,
    "first_k_dense_replace": 0,
}
"""heads * nope = heads * value = kv_lora_rank + rope = vocab = embed = experts = 8."""
SCORES_RAISED: dict[str, object] = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 4,
    "mscale": 0.5,
    "mscale_all_dim": 2.0,
}
"""YaRN with a factor on the tables and one on the scores."""
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
OPT: dict[str, object] = {
    "vocab_size": 37,
    "hidden_size": 12,
    "ffn_dim": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 24,
    "word_embed_proj_dim": None,
}
FALCON: dict[str, object] = {
    "vocab_size": 37,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BLOOM: dict[str, object] = {
    "vocab_size": 37,
    "hidden_size": 18,
    "n_layer": 2,
    "n_head": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MPT: dict[str, object] = {
    "vocab_size": 37,
    "d_model": 18,
    "n_layers": 2,
    "n_heads": 3,
    "max_seq_len": 24,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPTJ: dict[str, object] = {**GPT2, "n_embd": 18, "rotary_dim": 4}
GPT_NEOX: dict[str, object] = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
}

DISTILBERT: dict[str, object] = {
    "vocab_size": 37,
    "dim": 18,
    "hidden_dim": 28,
    "n_layers": 2,
    "n_heads": 3,
    "max_position_embeddings": 24,
}
TOKENS: dict[str, object] = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 3,
    "cls_token_id": 1,
    "sep_token_id": 3,
}
ELECTRA: dict[str, object] = {**BERT, "embedding_size": 10}
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

SWIN: dict[str, object] = {
    "image_size": 24,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 3, 1],
    "num_heads": [1, 2, 4],
    "window_size": 3,
    "mlp_ratio": 1.5,
}
"""Grids of 12, 6 and 3 patches a side: sixteen windows, four, and one that is not shifted."""

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

AUDIO: dict[str, object] = {
    "vocab_size": 11,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "conv_dim": [6, 10],
    "conv_kernel": [3, 2],
    "conv_stride": [2, 2],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
"""Frames of five samples, two of which neighbours share."""

BART: dict[str, object] = {
    **{key: value for key, value in WHISPER.items() if "position" not in key},
    "max_position_embeddings": 18,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "forced_eos_token_id": 2,
}
BART.pop("num_mel_bins")

GEMMA4: dict[str, object] = {
    **SMALL,
    "pad_token_id": 0,
    "num_hidden_layers": 4,
    "layer_types": 2 * ["sliding_attention", "full_attention"],
    "sliding_window": 5,
    "head_dim": 4,
    "global_head_dim": 24,
}
GEMMA4.pop("rope_theta")
GEMMA3N: dict[str, object] = {
    **GEMMA4,
    "rope_theta": 500.0,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 6,
    "num_kv_shared_layers": 0,
}
GEMMA3N.pop("global_head_dim")

BASES = {
    "gemma3n_text": GEMMA3N,
    "gemma4_text": GEMMA4,
    "roberta": ROBERTA,
    "electra": ELECTRA,
    "modernbert": {**BERT, "num_hidden_layers": 4, "local_attention": 6, **TOKENS},
    "deberta-v2": {**BERT, "relative_attention": True, "pos_att_type": "p2c|c2p"},
    "clip_text_model": {**BERT, **TOKENS},
    "albert": ELECTRA,
    "xlm-roberta": ROBERTA,
    "xlm-roberta-xl": ROBERTA,
    "camembert": ROBERTA,
    "distilbert": DISTILBERT,
    "mpnet": {**ROBERTA, "type_vocab_size": 2},
    "vit": IMAGES,
    "dinov2": IMAGES,
    "dinov3_vit": IMAGES,
    "clip_vision_model": IMAGES,
    "siglip_vision_model": IMAGES,
    "swin": SWIN,
    "whisper": WHISPER,
    "wav2vec2": AUDIO,
    "hubert": AUDIO,
    **dict.fromkeys(("bart", "mbart", "marian", "m2m_100"), BART),
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "gptj": GPTJ,
    "falcon": FALCON,
    "bloom": BLOOM,
    "mpt": MPT,
    "opt": OPT,
    "t5": T5,
    "mt5": T5,
    "umt5": T5,
    "switch_transformers": T5,
    "bert": BERT,
}


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
        return {**BASES.get(self.family, NO_PADDING), **self.keys}

    @property
    def output(self) -> str:
        """What the model returns: ``logits``, or of an encoder alone its ``hidden`` states."""
        alone = issubclass(CONFIGS[self.family], BertConfig | VisionConfig | AudioConfig)
        return "hidden" if alone else "logits"

    @property
    def decodes(self) -> bool:
        """Whether the model is an encoder-decoder, with tokens for the decoder."""
        return issubclass(CONFIGS[self.family], EncDecConfig | TwoStackConfig)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the model's inputs."""
        shapes = {VisionConfig: "pixels", WhisperConfig: "features", AudioConfig: "audio"}
        family = CONFIGS[self.family]
        name = next((n for shape, n in shapes.items() if issubclass(family, shape)), "tokens")
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
