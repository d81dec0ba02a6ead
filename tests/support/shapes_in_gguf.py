"""Models that moecc reads of GGUF and does not write, as llama.cpp's converter writes them."""

from __future__ import annotations

import json
import shutil
from math import inf
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from moecc.types import Array

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = [
    ("gpt2_plain", "gpt2"), ("gpt_neox_parallel", "gptneox"), ("bloom_plain", "bloom"),
    ("mpt_clipped", "mpt"), ("bert_gelu", "bert"),
]  # fmt: skip
# What llama.cpp fixes, and the golden models vary.
CHANGES = {
    "gpt2_plain": {"scale_attn_by_inverse_layer_idx": False},
    "gpt_neox_parallel": {},
    "bloom_plain": {},
    "mpt_clipped": {"attn_config": {"clip_qkv": 0.75}},
    "bert_gelu": {},
}


def stored(array: Array, name: str, config: dict[str, Any]) -> Array:
    """Return a tensor in the order in which the converter writes it."""
    kinds = ("attn.c_attn.weight", "c_proj.weight", "c_fc.weight")
    if config["model_type"] == "gpt2" and name.endswith(kinds):
        return np.ascontiguousarray(array.T)
    if "query_key_value" in name:
        heads = config.get("n_head") or config["num_attention_heads"]
        parts = array.reshape(heads, 3, -1, *array.shape[1:])
        return np.concatenate([parts[:, n].reshape(-1, *array.shape[1:]) for n in range(3)])
    return array


def write(case: str, architecture: str, folder: Path, **changes: Any) -> tuple[Path, Path]:
    """Write the golden model with its changes, and the same as a file of GGUF."""
    import gguf

    source, file = folder / "source", folder / "m.gguf"
    shutil.copytree(GOLDEN / case, source)
    config = json.loads((source / "config.json").read_text()) | CHANGES[case]
    (source / "config.json").write_text(json.dumps(config))
    writer = gguf.GGUFWriter(file, architecture)
    n = lambda *names: next(config[name] for name in names if name in config)  # noqa: E731
    config.setdefault("max_position_embeddings", 64)
    config.setdefault("intermediate_size", 4 * n("n_embd", "hidden_size", "d_model"))
    writer.add_context_length(n("n_positions", "max_seq_len", "max_position_embeddings"))
    writer.add_embedding_length(n("n_embd", "hidden_size", "d_model"))
    writer.add_feed_forward_length(n("n_inner", "intermediate_size"))
    writer.add_block_count(n("n_layer", "n_layers", "num_hidden_layers"))
    writer.add_head_count(n("n_head", "n_heads", "num_attention_heads"))
    writer.add_layer_norm_eps(n("layer_norm_epsilon", "layer_norm_eps"))
    # Without these two llama.cpp does not open a file.
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    if architecture == "mpt":
        writer.add_clamp_kqv(config["attn_config"]["clip_qkv"])
        writer.add_max_alibi_bias(8)
    if architecture == "bert":
        writer.add_causal_attention(changes.get("causal", False))
        writer.add_pooling_type(gguf.PoolingType.MEAN)
    if architecture == "gptneox":
        width = config["hidden_size"] // config["num_attention_heads"]
        rope = config["rope_parameters"]
        writer.add_rope_dimension_count(int(width * rope["partial_rotary_factor"]))
        writer.add_parallel_residual(config["use_parallel_residual"])
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    arch = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(arch, 8)
    for name, array in load_file(GOLDEN / case / "model.safetensors").items():
        if name.startswith("pooler"):
            continue
        parts = (".weight", ".bias")
        new = names.get_name(name, parts) or names.get_name(
            name.removeprefix("transformer."), parts
        )
        writer.add_tensor(new, stored(array, name, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return source, file


def write_gemma3n(source: Path, file: Path, **changes: Any) -> None:
    """Write a gemma3n as llama.cpp's converter does; `changes` are of its keys, by their ends."""
    import gguf

    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(file, "gemma3n")
    layers, width, heads = (
        config[name] for name in ("num_hidden_layers", "head_dim", "num_key_value_heads")
    )
    bounds = [NormalDist().inv_cdf(p) if p else -inf for p in config["activation_sparsity_pattern"]]
    keys: dict[str, Any] = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": layers,
        "feed_forward_length": config["intermediate_size"][0],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "attention.sliding_window": config["sliding_window"],
        "attention.sliding_window_pattern": [
            t.startswith("sliding") for t in config["layer_types"]
        ],
        "attention.shared_kv_layers": config["num_kv_shared_layers"],
        "rope.freq_base": config["rope_theta"],
        "rope.freq_base_swa": config["rope_local_base_freq"],
        "altup.active_idx": config["altup_active_idx"],
        "altup.num_inputs": config["altup_num_inputs"],
        "embedding_length_per_layer_input": config["hidden_size_per_layer_input"],
        "activation_sparsity_scale": bounds,
        "vocab_size": config["vocab_size"],
    }
    add = {list: writer.add_array, int: writer.add_uint32, float: writer.add_float32}
    for name, value in (keys | changes).items():
        add[type(value)](f"gemma3n.{name}", value)
    writer.add_tokenizer_model("no_vocab")
    tensors = load_file(source / "model.safetensors")
    shapes = {"k_proj": (heads * width, config["hidden_size"]), "k_norm": (width,)}
    shapes["v_proj"] = shapes["k_proj"]
    for layer in range(layers - config["num_kv_shared_layers"], layers):
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.self_attn.{name}.weight"] = np.zeros(shape, np.float32)
    for stack in ("altup_projections", "altup_unembed_projections"):
        parts = [tensors.pop(f"model.{stack}.{n}.weight") for n in range(3)]
        tensors[f"model.{stack}.weight"] = np.stack(parts)
    arch = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}["gemma3n"]
    names = gguf.get_tensor_name_map(arch, layers)
    for name, array in tensors.items():
        named = f"{name}.weight" if name.endswith("_scale") else name
        writer.add_tensor(names.get_name(named, (".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
