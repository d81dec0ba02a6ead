"""Translate config.json to the metadata of a GGUF file.

The reverse of `moecc.checkpoint.gguf.config`.
"""

from __future__ import annotations

from moecc.checkpoint.gguf.encode import Key, Written
from moecc.checkpoint.gguf.families import GgufExperts, GgufFamily
from moecc.checkpoint.gguf.rope import rope_keys
from moecc.support.untyped import Json


def config_keys(architecture: str, family: GgufFamily, config: Json) -> list[Key]:
    """Return the keys of `architecture` for a config that `misfits` does not object to."""
    heads, head_dim = config["num_attention_heads"], config["head_dim"]
    values: dict[str, Written] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": round(head_dim * config.get("partial_rotary_factor", 1)),
        "vocab_size": config["vocab_size"],
        **rope_keys(config),
        **(_experts(family.experts, config) if family.experts else {}),
        **{name: config[ours] for name, ours in family.keys},
        **{n: config[ours] for n, ours in family.optional_keys if config[ours] is not None},
        **({"rope.freq_base_swa": config["rope_local_base_freq"]} if family.local_theta else {}),
        **dict(family.fixed),
    }
    return [Key(f"{architecture}.{name}", value) for name, value in values.items()]


def _experts(experts: GgufExperts, config: Json) -> dict[str, Written]:
    values: dict[str, Written] = {
        "expert_count": config["num_experts"],
        "expert_used_count": config[experts.chosen],
    }
    if experts.width_key:
        values["expert_feed_forward_length"] = config["moe_intermediate_size"]
    if experts.shared_count:
        count = config[experts.shared_count]
        values["expert_shared_count"] = count
        values["expert_shared_feed_forward_length"] = count * config["moe_intermediate_size"]
    elif experts.shared:
        values["expert_shared_feed_forward_length"] = config["shared_expert_intermediate_size"]
    return values
