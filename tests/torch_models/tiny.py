"""Small models of the architectures of transformers, and inputs for them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

SIZES = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "width",
         "projection_dim", "text_hidden_size", "word_embed_proj_dim", "d_embed", "emb_dim",
         "encoder_hidden_size", "decoder_hidden_size", "hidden_dim", "model_dim", "mm_hidden_size",
         "output_dim", "out_hidden_size", "attention_hidden_size", "mask_feature_size",
         "feature_size", "fpn_hidden_size", "rnn_hidden_size", "n_embed",
         "qformer_hidden_size"), 32),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "d_inner",
         "ffn_hidden_size", "dim_feedforward", "encoder_feedforward_dim", "moe_intermediate_size",
         "shared_expert_intermediate_size", "decoder_feedforward_dim", "expert_dim", "mlp_dim",
         "encoder_intermediate_dim", "expert_ffn_hidden_size", "intermediate_dim"), 48),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "depth",
         "decoder_layers", "num_encoder_layers", "num_decoder_layers", "encoder_num_layers",
         "decoder_num_layers", "num_hidden_groups", "l_layers", "x_layers",
         "r_layers"), 2),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
         "decoder_attention_heads", "attention_heads", "encoder_num_attention_heads",
         "decoder_num_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "attention_head_dim", "kv_channels"), 8),
    **dict.fromkeys(("vocab_size", "n_vocab"), 99),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_sequence_length"), 64),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4),
    "vocab_size_per_layer_input": 99, "hidden_size_per_layer_input": 8,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "image_size": 32, "patch_size": 8, "max_source_positions": 20,
    "max_target_positions": 40,
    "num_mel_bins": 16, "state_size": 8, "mamba_d_state": 8, "ssm_state_size": 8,
    "codebook_size": 32, "num_queries": 5, "num_query_tokens": 4, "num_frames": 4,
    "rotary_dim": 4, "mamba_n_heads": 8, "mamba_d_head": 8, "n_mamba_heads": 8,
    "mamba_headdim": 8, "mamba_expand": 2, "num_experts_per_token": 2, "moe_topk": 2,
    "moe_top_k": 2, "mamba_num_heads": 8, "mamba_head_dim": 8,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
"""What attributes of configs are set to, where a config has them as numbers."""

LISTS = {
    **dict.fromkeys(("depths", "depth", "encoder_depths", "decoder_depths", "layers"), 1),
    **dict.fromkeys(("num_heads", "num_attention_heads", "encoder_num_heads", "num_head"), 2),
}  # fmt: skip
"""What the entries of lists of numbers are set to: one for each stage of a model of images."""

BY_STAGE = ("hidden_sizes", "dims", "embed_dims", "embed_dim", "encoder_hidden_sizes")
"""Lists of widths, which double from stage to stage."""

_MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
_SWIN = {"window_size": 2, "depths": [1, 1], "num_heads": [4, 4], "embed_dim": 16}
CHANGES: dict[str, dict[str, Any]] = {
    **{
        kind: {"rope_parameters": _MROPE}
        for kind in ("glm46v", "glm4v_text", "glm_image_text", "glm_ocr_text", "paddleocr_vl_text",
                     "qwen2_5_omni_text", "qwen2_5_vl_text", "qwen2_vl_text", "hunyuan_vl_text",
                     "glm4v", "glm_image", "glm_ocr", "qwen2_5_vl", "qwen2_vl")
    },
    "glm4v_moe_text": {
        "rope_parameters": {**_MROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}},
    **dict.fromkeys(("swin", "swinv2", "donut-swin", "swin2sr", "maskformer-swin"), _SWIN),
    "bailing_hybrid": {"num_group": 1, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
              "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": None, "laurel_rank": 4,
                     "activation_sparsity_pattern": [0.95, 0.0]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16, "adapter_rank": 4},
    "esm": {"vocab_size": 99, "mask_token_id": 32, "pad_token_id": 1},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 16},
    "perceiver": {"num_latents": 8, "d_latents": 32, "qk_channels": 32, "v_channels": 32,
                  "num_self_attends_per_block": 2},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
    **{kind: {"context_length": 32, "patch_length": 8, "patch_stride": 8, "num_input_channels": 2}
       for kind in ("patchtst", "patchtsmixer")},
}  # fmt: skip
"""What an architecture needs besides, by its type and the names of attributes."""


def _small(name: str, value, layers: int, *, lists: bool, sizes: bool):
    """Return a small value for an attribute of a config, or the value itself."""
    is_list = isinstance(value, list | tuple) and len(value) > 0
    if isinstance(value, bool) or name.startswith("_"):
        return value
    if isinstance(value, int):
        if name in SIZES and (sizes or SIZES[name] == 2):
            return SIZES[name]
        return 1 + len(name) % 60 if name.endswith("token_id") and value > 90 else value
    if value is None and name in ("head_dim", "num_experts_per_tok", "num_key_value_heads"):
        return SIZES[name]
    if is_list and name.endswith(("layer_types", "layers_block_type")):
        return _short(list(value), layers)
    if is_list and lists and all(isinstance(n, int) for n in value):
        if name in BY_STAGE:
            return [16 * 2**i for i in range(len(value))]
        if name in LISTS:
            return [LISTS[name]] * len(value)
    return value


def shrink(config, *, lists: bool, sizes: bool):
    """Make the sizes of a config small; those that its own class has lists for, too, if asked."""
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            shrink(value, lists=lists, sizes=sizes)
            continue
        small = _small(name, value, _layers(config), lists=lists, sizes=sizes)
        if small is not value:
            _set(config, name, small)
    _finish(config)
    return config


def construct(kind, *, lists: bool, sizes: bool):
    """Return a config made of small sizes, from which its class derives all else."""
    config = kind()
    layers = SIZES["num_hidden_layers"] if sizes else _layers(config)
    values = {}
    for name, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            values[name] = construct(type(value), lists=lists, sizes=sizes)
            continue
        small = _small(name, value, layers, lists=lists, sizes=sizes)
        if small is not value:
            values[name] = small
    if hasattr(config, "kv_lora_rank"):
        values["num_key_value_heads"] = 4
    config = kind(**values | CHANGES.get(config.model_type, {}))
    _finish(config)
    return config


def _layers(config) -> int:
    return int(getattr(config, "num_hidden_layers", None) or 2)


def _finish(config):
    if hasattr(config, "kv_lora_rank"):  # latent attention has as many keys as queries
        _set(config, "num_key_value_heads", 4)
    if not hasattr(config, "pad_token_id"):
        _set(config, "pad_token_id", 0)
    if hasattr(config, "attention_layers") and hasattr(config, "attention_types"):
        config.attention_types = [[["global", "local"], 1]]
        config.attention_layers = ["global", "local"]


def _short(kinds: list[Any], count: int) -> list[Any]:
    """Return `count` kinds of layers, the different ones first."""
    different = list(dict.fromkeys(kinds))
    return [*different, *kinds][:count] if len(kinds) >= count else kinds


def _set(config, name: str, value: object):
    with suppress(TypeError, ValueError, NotImplementedError, AttributeError):
        setattr(config, name, value)


FAMILIES = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)  # fmt: skip


def architectures() -> dict[str, str]:
    """Return the class of a model for each model type, those that write text first."""
    classes = {}
    for family in FAMILIES:
        for kind, name in getattr(modeling_auto, family).items():
            classes.setdefault(kind, name if isinstance(name, str) else name[0])
    return classes


MAX_ELEMENTS = 20_000_000


def builds(kind: str, name: str) -> Iterator[Any]:
    """Yield small models in float64, in evaluation, the smallest first.

    Raises: as the last way to build one, where none succeeds.
    """
    error = ValueError("too large")
    is_built = False
    ways = [(True, True), (False, True), (False, False)]
    for is_constructed, (lists, sizes) in product((True, False), ways):
        try:
            kind_of_model, config_class = (
                getattr(transformers, name),
                transformers.CONFIG_MAPPING[kind],
            )
            if is_constructed:
                config = construct(config_class, lists=lists, sizes=sizes)
            else:
                config = config_class()
            try:
                text = config.get_text_config()
            except ValueError:  # several: that of what it writes
                text = config.get_text_config(decoder=True)
            if kind_of_model.config_class is type(text):  # of the text model inside a wrapper
                config = text
            if not is_constructed:
                shrink(config, lists=lists, sizes=sizes)
            config.use_cache = False
            if hasattr(config, "default_language"):
                config.default_language = config.languages[0]
            for part in (config, *vars(config).values()):
                if isinstance(part, transformers.PretrainedConfig):
                    part._experts_implementation = "batched_mm"
            with torch.device("meta"):
                model = kind_of_model._from_config(config)
            if sum(p.numel() for p in model.parameters()) > MAX_ELEMENTS:
                continue
            torch.manual_seed(0)
            model = kind_of_model._from_config(config, dtype=torch.float64)
            is_built = True
            yield model.double().eval()
        except Exception as problem:  # a size does not fit another: the next way
            error = problem
    if not is_built:
        raise error


def inputs(model) -> Iterator[dict[str, Any]]:
    """Yield inputs that the model may take."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    names = inspect.signature(model.forward).parameters
    text = getattr(config, "text_config", None) or config
    vision = getattr(config, "vision_config", None) or config
    vocab = getattr(text, "vocab_size", None) or 90
    ids = torch.randint(3, max(min(vocab, 90), 4), (2, 7), generator=generator)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    size = getattr(vision, "image_size", 32)
    height, width = size if isinstance(size, list | tuple) else (size or 32,) * 2
    channels = getattr(vision, "num_channels", 3)
    mel = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", 16)
    frames = 2 * (getattr(config, "max_source_positions", None) or 20)
    steps = getattr(config, "context_length", None) or 32
    every = {
        "input_ids": ids,
        "pixel_values": draw(2, channels if isinstance(channels, int) else 3, height, width),
        "input_features": draw(2, mel, min(frames, 80)),
        "input_values": draw(2, 800),
        "decoder_input_ids": ids,
        "bbox": torch.zeros(2, 7, 4, dtype=torch.long),
        "inputs": ids,
        "past_values": draw(2, steps, getattr(config, "num_input_channels", 1)),
    }
    main = model.main_input_name
    main = main if isinstance(main, str) else main[0]
    extra = {"use_cache": False} if "use_cache" in names else {}
    decoder = {"decoder_input_ids": ids} if "decoder_input_ids" in names else {}
    some = {main: every[main]} if main in every else {}
    if some:
        yield {**some, **decoder, **extra}
        yield {**some, **extra}
    if "bbox" in names:
        yield {"input_ids": ids, "bbox": every["bbox"], **extra}
    if {"input_ids", "pixel_values"} <= names.keys():
        yield {"input_ids": ids, "pixel_values": every["pixel_values"], **extra}
    if "pixel_values" in names:
        yield {"pixel_values": draw(2, 3, 64, 64), **extra}
        yield {"pixel_values": draw(2, 3, 224, 224), **extra}
        yield {"pixel_values": draw(2, 4, 3, height, width), **extra}
    if "input_features" in names:
        yield {"input_features": draw(2, 80, mel), **decoder, **extra}
        yield {"input_features": draw(2, 40, 80), **decoder, **extra}
    if "input_values" in names:
        yield {"input_values": draw(2, 1, 1920)}
        yield {"input_values": draw(2, getattr(config, "max_length", 64), mel)}
        yield {"input_values": draw(2, 8000), **decoder, **extra}
    if {"input_ids", "input_features"} <= names.keys():
        yield {"input_ids": ids, "input_features": draw(2, 1, 64, mel)}
        yield {"input_ids": ids, "input_features": draw(2, mel, 40)}
    if "input_features_mask" in names:
        mask = torch.ones(2, 40, dtype=torch.long)
        yield {"input_features": draw(2, mel, 40), "input_features_mask": mask}
        yield {"input_features": draw(2, 40, mel), "input_features_mask": mask}
    width = getattr(config, "hidden_size", None) or 32
    patch = getattr(vision, "patch_size", None) or 8
    patch = patch if isinstance(patch, int) else 8
    if "grid_thw" in names:
        frames_of_patch = getattr(vision, "temporal_patch_size", 1)
        for pixels in (3 * frames_of_patch * patch**2, width):
            name = "hidden_states" if "hidden_states" in names else "pixel_values"
            yield {name: draw(16, pixels), "grid_thw": torch.tensor([[1, 4, 4]])}
    if "spatial_shapes" in names:
        yield {"pixel_values": draw(2, 16, 3 * patch**2), "spatial_shapes": torch.full((2, 2), 4),
               "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long)}  # fmt: skip
    if {"input_ids", "input_values"} <= names.keys():
        yield {"input_ids": ids, "input_values": draw(2, 1, 1920)}
    if "query_embeds" in names:
        yield {"query_embeds": draw(2, 4, width)}
    if "visual_feats" in names:
        features = getattr(config, "visual_feat_dim", 32)
        yield {"input_ids": ids, "visual_feats": draw(2, 4, features), "visual_pos": draw(2, 4, 4)}
    if hasattr(config, "num_codebooks"):
        yield {"input_ids": ids.repeat(config.num_codebooks, 1), **extra}
    if "input_features" in names:
        yield {"input_features": draw(2, 64, 128)}
    for name in ("input_ids", "input_values", "inputs"):
        if name in names:
            yield {name: every[name], **decoder, **extra}
