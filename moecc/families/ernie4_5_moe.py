"""ernie4_5_moe: a bias in the choice of experts, shared experts, neighbours rotated together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from moecc.families.config import config_class
from moecc.families.mixture import MOE_DEFAULTS, MoeConfig
from moecc.families.reader import Reader


@config_class
class Ernie45MoeConfig(MoeConfig):
    """An ernie4_5_moe without biases in its projections; experts in every n-th layer of a range.

    On disk the rows of queries and keys are ordered so that neighbours are rotated together.
    """

    model_type: ClassVar[str] = "ernie4_5_moe"
    architecture: ClassVar[str] = "Ernie4_5_MoeForCausalLM"
    fixed: ClassVar[Mapping[str, object]] = {
        "qkv_bias": False,
        "output_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
    }
    experts_keys: ClassVar[tuple[str, ...]] = ("moe_num_experts",)
    top_k_key: ClassVar[str] = "moe_k"
    sparse_style: ClassVar[str] = "interval"
    renormalises: ClassVar[bool | None] = True
    has_shared_expert: ClassVar[bool] = True
    shared_is_optional: ClassVar[bool] = True
    shared_count_key: ClassVar[str] = "moe_num_shared_experts"
    shared_gate: ClassVar[bool] = False
    has_routing_bias: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, object]] = {
        **{key: value for key, value in MOE_DEFAULTS.items() if key != "norm_topk_prob"},
        "vocab_size": 103_424,
        "hidden_size": 2560,
        "intermediate_size": 12_288,
        "num_hidden_layers": 28,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
        "use_bias": False,
        "moe_intermediate_size": 1536,
        "moe_k": 6,
        "moe_num_experts": 64,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }

    norm_topk_prob: bool = True

    @classmethod
    def _read_layout(cls, reader: Reader) -> dict[str, object]:
        reader.number("moe_norm_min", above=0)
        if reader.flag("use_bias"):
            reader.refuse("use_bias", "biases in this family are not supported", expected="false")
        return {}

    def _write_layout(self) -> dict[str, object]:
        return {"use_bias": False, "moe_norm_min": 1e-12}
