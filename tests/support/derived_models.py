"""Golden models with another config: what llama.cpp fixes is not what the golden ones vary."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

GOLDEN = Path(__file__).parents[1] / "golden"

DERIVED: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm3": (
        "smollm3_window",
        {
            "no_rope_layers": [1, 1, 1, 0], "use_sliding_window": False, "sliding_window": None,
            "layer_types": None,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3_groups",
        {
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8,
                "mscale": 0.707, "mscale_all_dim": 0.707, "rope_theta": 500.0,
            },
        },
    ),
    "gpt_oss": (
        "gpt_oss_limits",
        {"swiglu_alpha": 1.702, "swiglu_limit": 7.0, "rope_parameters": {"rope_theta": 500.0},
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "llama4": (
        "llama4_scout", {"attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1},
    ),
    "lfm2_moe": ("lfm2_moe_bias", {"conv_bias": False, "routed_scaling_factor": 1.0}),
    "gemma2": ("gemma2_caps", {"query_pre_attn_scalar": 6}),
    "gemma3": (
        "gemma3_local",
        {
            "query_pre_attn_scalar": 8, "sliding_window_pattern": 6, "num_hidden_layers": 6,
            "layer_types": [*["sliding_attention"] * 5, "full_attention"],
        },
    ),
}  # fmt: skip
"""By the architecture of GGUF: the golden model, and what is changed in its config."""


def derive(architecture: str, folder: Path) -> Path:
    """Write the model into a new folder below `folder`; its logits are not the golden ones."""
    source, changes = DERIVED[architecture]
    made = folder / architecture
    made.mkdir(parents=True)
    for path in (GOLDEN / source).iterdir():
        shutil.copy(path, made)
    config = json.loads((made / "config.json").read_text("utf-8"))
    (made / "config.json").write_text(json.dumps(config | changes), "utf-8")
    if "num_hidden_layers" in changes:
        _repeat_layers(made, config["num_hidden_layers"], changes["num_hidden_layers"])
    if changes.get("conv_bias") is False:
        tensors = load_file(made / "model.safetensors")
        plain = {n: t for n, t in tensors.items() if ".conv." not in n or not n.endswith("bias")}
        save_file(plain, made / "model.safetensors")
    return made


def _repeat_layers(folder: Path, before: int, after: int) -> None:
    """Add layers that have the weights of the first ones."""
    tensors = load_file(folder / "model.safetensors")
    for layer in range(before, after):
        old, new = (f"model.layers.{n}." for n in (layer - before, layer))
        own = [name for name in tensors if name.startswith(old)]
        tensors |= {new + name[len(old) :]: tensors[name] for name in own}
    save_file(tensors, folder / "model.safetensors")
