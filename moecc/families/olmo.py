"""olmo2, olmoe and flex_olmo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from moecc.families.config import config_class
from moecc.families.decoder import DEFAULTS, DecoderConfig
from moecc.families.mixture import MOE_DEFAULTS, MoeConfig


@config_class
class Olmo2Config(DecoderConfig):
    """An olmo2: what a block adds is normalised, what it reads is not."""

    model_type: ClassVar[str] = "olmo2"
    architecture: ClassVar[str] = "Olmo2ForCausalLM"
    fixed: ClassVar[Mapping[str, object]] = {
        "mlp_bias": False,
        "qk_norm": True,
        "qk_norm_across": True,
        "norm_placement": "after",
    }
    bias_key: ClassVar[str | None] = "attention_bias"
    defaults: ClassVar[Mapping[str, object]] = {
        **DEFAULTS,
        "vocab_size": 50_304,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 1,
        "eos_token_id": 50_279,
    }

    qk_norm: bool = True
    qk_norm_across: bool = True
    norm_placement: str = "after"

    def _write_rope(self) -> dict[str, object]:
        """Return the keys; version 4 takes the scalings that it knows by their older name."""
        keys = super()._write_rope()
        if self.rope.type in ("linear", "dynamic"):
            keys["rope_scaling"] = {"type": self.rope.type, "factor": self.rope.factor}
        return keys


# olmoe and flex_olmo: experts in every layer, norms over all heads of the queries together.


@config_class
class OlmoeConfig(MoeConfig):
    """An olmoe: norms before each block; `clip_qkv` is not supported."""

    model_type: ClassVar[str] = "olmoe"
    architecture: ClassVar[str] = "OlmoeForCausalLM"
    fixed: ClassVar[Mapping[str, object]] = {
        "mlp_bias": False,
        "qk_norm": True,
        "qk_norm_across": True,
    }
    bias_key: ClassVar[str | None] = "attention_bias"
    experts_keys: ClassVar[tuple[str, ...]] = ("num_experts",)
    sparse_style: ClassVar[str] = "all"
    has_expert_width: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, object]] = {
        **MOE_DEFAULTS,
        "vocab_size": 50_304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 8,
        "num_experts": 64,
        "router_aux_loss_coef": 0.01,
        "pad_token_id": 1,
        "eos_token_id": 50_279,
    }

    qk_norm: bool = True
    qk_norm_across: bool = True


@config_class
class FlexOlmoConfig(MoeConfig):
    """A flex_olmo: the mixture of experts of an olmo2, whose norms come after each block."""

    model_type: ClassVar[str] = "flex_olmo"
    architecture: ClassVar[str] = "FlexOlmoForCausalLM"
    fixed: ClassVar[Mapping[str, object]] = {
        "mlp_bias": False,
        "qk_norm": True,
        "qk_norm_across": True,
        "norm_placement": "after",
    }
    bias_key: ClassVar[str | None] = "attention_bias"
    experts_keys: ClassVar[tuple[str, ...]] = ("num_experts",)
    sparse_style: ClassVar[str] = "all"
    has_expert_width: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, object]] = {
        **MOE_DEFAULTS,
        "vocab_size": 100_352,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        "rope_theta": 500_000.0,
        "num_experts_per_tok": 5,
        "num_experts": 7,
        "router_aux_loss_coef": 0.01,
        "pad_token_id": 100_277,
        "eos_token_id": 100_257,
    }

    qk_norm: bool = True
    qk_norm_across: bool = True
    norm_placement: str = "after"
