"""Tiny wrappers of transformers, made and judged: run by an interpreter that has it.

Reads {"make": FOLDER} or {"judge": {NAME: FOLDER}, "sources": FOLDER} from standard input.  The
first writes a folder of each wrapper and its logits of tokens alone; the second returns how far the
logits of a folder are from them, relative to the largest, and what loading reported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText

TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "patch_size": 14}
ONE = {**VISION, "num_hidden_layers": 1, "image_size": 28}
IMAGE = {"image_token_id": 60, "image_token_index": 60}
MROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "rope_theta": 1e6}
QWEN = {**IMAGE, "video_token_id": 61, "vision_start_token_id": 58, "vision_end_token_id": 59}
DEPTH = {"depth": 1, "num_heads": 2, "patch_size": 14}
DELTA = {
    "head_dim": 8, "full_attention_interval": 2, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
                        "mrope_section": [1, 1, 0]},
}  # fmt: skip
ENCODER = {
    **DEPTH, "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32,
    "num_position_embeddings": 16,
}  # fmt: skip
WRAPPERS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llava": ({"model_type": "llama"}, {**ONE, "model_type": "clip_vision_model"}, IMAGE),
    "vipllava": ({"model_type": "llama"}, {**ONE, "model_type": "clip_vision_model"}, IMAGE),
    "llava_next": ({"model_type": "llama"}, {**ONE, "model_type": "clip_vision_model"}, IMAGE),
    "llava_onevision": (
        {"model_type": "qwen2"}, {**ONE, "model_type": "siglip_vision_model"}, IMAGE,
    ),
    "idefics3": ({"model_type": "llama"}, ONE, {**IMAGE, "pad_token_id": 0}),
    "mistral3": (
        {"model_type": "mistral", "sliding_window": None, "head_dim": 8},
        {**ONE, "model_type": "pixtral", "head_dim": 8},
        {**IMAGE, "vision_feature_layer": -1},
    ),
    "internvl": (
        {"model_type": "qwen2"},
        {**ONE, "image_size": [28, 28], "patch_size": [14, 14], "model_type": "internvl_vision"},
        IMAGE,
    ),
    "smolvlm": ({"model_type": "llama"}, ONE, {**IMAGE, "pad_token_id": 0}),
    "gemma3": (
        {"sliding_window": 16, "query_pre_attn_scalar": 8, "head_dim": 8}, ONE,
        {**IMAGE, "mm_tokens_per_image": 4, "boi_token_index": 61, "eoi_token_index": 62},
    ),
    "gemma4": (
        {"sliding_window": 16, "head_dim": 8, "global_head_dim": 12, "num_hidden_layers": 6,
         "num_kv_shared_layers": 3, "hidden_size_per_layer_input": 4,
         "layer_types": 2 * ["sliding_attention", "sliding_attention", "full_attention"],
         "vocab_size_per_layer_input": 64},
        {**VISION, "num_hidden_layers": 1, "num_key_value_heads": 2, "head_dim": 8,
         "position_embedding_size": 16},
        IMAGE,
    ),
    "qwen2_vl": (
        MROPE, {**DEPTH, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}, QWEN,
    ),
    "qwen2_5_vl": (
        MROPE, {**DEPTH, "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32}, QWEN,
    ),
    "qwen3_vl": (
        {"rope_theta": 5e6, "head_dim": 8,
         "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
        {**DEPTH, "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32,
         "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        QWEN,
    ),
    "qwen3_5": (DELTA, ENCODER, QWEN),
    "qwen3_5_moe": (
        {**DELTA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        ENCODER,
        QWEN,
    ),
    "llama4": (
        {"intermediate_size_mlp": 40, "head_dim": 8, "interleave_moe_layer_step": 2,
         "num_local_experts": 4, "no_rope_layers": [1, 0], "attention_chunk_size": 7,
         "floor_scale": 5},
        {**ONE, "vision_output_dim": 16, "intermediate_size": 64, "projector_input_dim": 16,
         "projector_output_dim": 16},
        IMAGE,
    ),
}  # fmt: skip


def logits_of(model):
    if model.config.model_type == "llama4":
        # transformers 5.24 asks the output of its text model for images.
        model = model.language_model
    tokens = torch.randint(0, 56, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.numpy()


def make(folder: Path) -> dict[str, str]:
    for name, (text, vision, keys) in WRAPPERS.items():
        if name not in CONFIG_MAPPING:
            continue  # of a later version
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            name, text_config={**TEXT, **text}, vision_config=dict(vision), **keys
        )
        model = AutoModelForImageTextToText.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(folder / name)
        np.save(folder / f"{name}.npy", logits_of(model))
    return {"version": transformers.__version__}


def judge(folders: dict[str, str], sources: Path) -> dict[str, dict[str, Any]]:
    verdicts = {}
    for name, folder in folders.items():
        model, report = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        expected = np.load(sources / f"{name.partition('-')[0]}.npy")
        gap = np.abs(logits_of(model.eval()) - expected).max() / np.abs(expected).max()
        verdicts[name] = {
            "gap": float(gap),
            "reported": {key: sorted(map(str, value)) for key, value in report.items() if value},
            "text": model.config.text_config.model_type,
        }
    return verdicts


if __name__ == "__main__":
    question = json.load(sys.stdin)
    answer: Any = (
        make(Path(question["make"]))
        if "make" in question
        else judge(question["judge"], Path(question["sources"]))
    )
    print(json.dumps(answer))
