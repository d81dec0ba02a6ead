"""glm4_moe: sigmoid scores, ungated shared experts, dense first layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from moecc.families.config import config_class
from moecc.families.mixture import MOE_DEFAULTS, MoeConfig
from moecc.families.reader import Reader
from moecc.families.rope import partial_rotary_factor, read_partial_rotary, read_rope

NO_PREDICTION = {"num_nextn_predict_layers": 0, "num_mtp_layers": 0}
"""Keys of both versions of transformers for layers that predict further tokens: there are none."""


@config_class
class Glm4MoeConfig(MoeConfig):
    """A glm4_moe: attention of a llama, a qwen2 or a qwen3, and the experts of DeepSeek-V3."""

    model_type: ClassVar[str] = "glm4_moe"
    architecture: ClassVar[str] = "Glm4MoeForCausalLM"
    fixed: ClassVar[Mapping[str, object]] = {"output_bias": False, "mlp_bias": False}
    options: ClassVar[frozenset[str]] = frozenset({"rotary_dim"})
    bias_key: ClassVar[str | None] = "attention_bias"
    groups_may_be_null: ClassVar[bool] = False
    experts_keys: ClassVar[tuple[str, ...]] = ("n_routed_experts",)
    sparse_style: ClassVar[str] = "leading"
    score: ClassVar[str] = "sigmoid"
    has_shared_expert: ClassVar[bool] = True
    shared_count_key: ClassVar[str] = "n_shared_experts"
    shared_gate: ClassVar[bool] = False
    has_gate_scale: ClassVar[bool] = True
    has_routing_bias: ClassVar[bool] = True
    has_balance_loss: ClassVar[bool] = False
    upcycle_options: ClassVar[str] = (
        "top-k=2 gates=sigmoid-renormalised shared=0.5 shared-gate=none"
    )
    defaults: ClassVar[Mapping[str, object]] = {
        **{k: v for k, v in MOE_DEFAULTS.items() if k not in ("router_aux_loss_coef",)},
        "vocab_size": 151_552,
        "hidden_size": 4096,
        "intermediate_size": 10_944,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "moe_intermediate_size": 1408,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "use_qk_norm": False,
        "num_nextn_predict_layers": 1,
    }

    norm_topk_prob: bool = True

    @classmethod
    def _read_features(cls, reader: Reader) -> dict[str, object]:
        return {**super()._read_features(reader), "qk_norm": reader.flag("use_qk_norm")}

    @classmethod
    def _read_rope(cls, reader: Reader, head_dim: int) -> dict[str, object]:
        length = reader.size("max_position_embeddings")
        key, default = "partial_rotary_factor", 0.5
        return {
            "rope": read_rope(reader, length, types=cls.rope_types, partial=True),
            "rotary_dim": read_partial_rotary(reader, head_dim, key, default),
        }

    @classmethod
    def _read_layout(cls, reader: Reader) -> dict[str, object]:
        groups, chosen = reader.size("n_group"), reader.size("topk_group")
        if groups != chosen:
            what = "moecc does not restrict a token to some groups of experts"
            reader.refuse("topk_group", what, expected=f"n_group = {groups}, or both 1")
        for key in NO_PREDICTION:
            reader.value(key)
        return {}

    def _write_rope(self) -> dict[str, object]:
        share = partial_rotary_factor(self.rotated_dim, self.head_dim)
        keys = super()._write_rope()
        parameters = keys["rope_parameters"]
        assert isinstance(parameters, dict), "as the rope writes them"
        return {
            **keys,
            "rope_parameters": {**parameters, "partial_rotary_factor": share},
            "partial_rotary_factor": share,
        }

    def _write_layout(self) -> dict[str, object]:
        groups = {"n_group": 1, "topk_group": 1}
        return {**groups, **NO_PREDICTION, "use_qk_norm": self.qk_norm}
