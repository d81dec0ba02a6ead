"""Golden models of the GPT line and bert as GGUF, as llama.cpp's converter writes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
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
