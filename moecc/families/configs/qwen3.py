"""qwen3 and qwen3_moe: norms of queries and keys in each head, optional attention biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from .base import DEFAULTS, DecoderConfig
from .model import config_class
from .moe import MOE_DEFAULTS, MoeConfig


@config_class
class Qwen3Config(DecoderConfig):
    """A qwen3: norms of queries and keys over each head's width."""

    model_type: ClassVar[str] = "qwen3"
    architecture: ClassVar[str] = "Qwen3ForCausalLM"
    fixed: ClassVar[Mapping[str, bool]] = {"mlp_bias": False, "qk_norm": True}
    bias_key: ClassVar[str | None] = "attention_bias"
    window_style: ClassVar[str] = "top"
    defaults: ClassVar[Mapping[str, object]] = {
        **DEFAULTS,
        "hidden_size": 4096,
        "intermediate_size": 22_016,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32_768,
    }

    qk_norm: bool = True


@config_class
class Qwen3MoeConfig(MoeConfig):
    """A qwen3_moe: qwen3's attention, routed experts without a shared one."""

    model_type: ClassVar[str] = "qwen3_moe"
    architecture: ClassVar[str] = "Qwen3MoeForCausalLM"
    fixed: ClassVar[Mapping[str, bool]] = {"mlp_bias": False, "qk_norm": True}
    bias_key: ClassVar[str | None] = "attention_bias"
    window_style: ClassVar[str] = "switched"
    groups_may_be_null: ClassVar[bool] = False
    # Version 4 writes num_experts, version 5 num_local_experts, and each reads its own.
    experts_keys: ClassVar[tuple[str, ...]] = ("num_experts", "num_local_experts")
    defaults: ClassVar[Mapping[str, object]] = {
        **MOE_DEFAULTS,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
    }

    qk_norm: bool = True
