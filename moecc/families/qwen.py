"""qwen2 (and 2.5), qwen3, and their mixtures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from moecc.families.config import config_class
from moecc.families.decoder import DEFAULTS, DecoderConfig
from moecc.families.mixture import MOE_DEFAULTS, MoeConfig
from moecc.families.reader import KeyProblem, Reader, key_problem


@config_class
class Qwen2Config(DecoderConfig):
    """A qwen2: biases on query, key and value, and a sliding window in the upper layers."""

    model_type: ClassVar[str] = "qwen2"
    architecture: ClassVar[str] = "Qwen2ForCausalLM"
    fixed: ClassVar[Mapping[str, bool]] = {
        "qkv_bias": True,
        "output_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
    }
    window_style: ClassVar[str] = "top"
    defaults: ClassVar[Mapping[str, object]] = {
        **DEFAULTS,
        "hidden_size": 4096,
        "intermediate_size": 22_016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32_768,
    }

    qkv_bias: bool = True


@config_class
class Qwen2MoeConfig(MoeConfig):
    """A qwen2_moe: a shared expert with a sigmoid gate beside the routed ones."""

    model_type: ClassVar[str] = "qwen2_moe"
    architecture: ClassVar[str] = "Qwen2MoeForCausalLM"
    fixed: ClassVar[Mapping[str, bool]] = {
        "output_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
    }
    window_style: ClassVar[str] = "agreed"
    groups_may_be_null: ClassVar[bool] = False
    experts_keys: ClassVar[tuple[str, ...]] = ("num_experts",)
    has_shared_expert: ClassVar[bool] = True
    upcycle_options: ClassVar[str] = "top-k=2 shared=0.5"
    defaults: ClassVar[Mapping[str, object]] = {
        **MOE_DEFAULTS,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 32_768,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
        "qkv_bias": True,
    }

    qkv_bias: bool = True

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        width = self.head_dim * self.num_attention_heads
        if width != self.hidden_size:
            # transformers 4 raises for it, and other runtimes do not read the key.
            what = "qwen2_moe has heads of hidden_size / num_attention_heads"
            keys = ("head_dim", "hidden_size", "num_attention_heads")
            yield key_problem(what, f"heads x head_dim = {self.hidden_size}", f"{width}", *keys)

    @classmethod
    def _read_features(cls, reader: Reader) -> dict[str, object]:
        return {**cls.fixed, "qkv_bias": reader.flag("qkv_bias")}

    def _write(self) -> dict[str, object]:
        return {**super()._write(), "qkv_bias": self.qkv_bias}


# qwen3 and qwen3_moe: norms of queries and keys in each head, optional attention biases.


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
