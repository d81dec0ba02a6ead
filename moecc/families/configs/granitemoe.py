"""granitemoe: a granite whose every feed-forward block is a mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from .granite import MULTIPLIERS, read_multipliers, write_multipliers
from .model import config_class
from .moe import MOE_DEFAULTS, MoeConfig
from .reader import Reader


@config_class
class GraniteMoeConfig(MoeConfig):
    """A granitemoe: granite's four factors, gates always renormalised."""

    model_type: ClassVar[str] = "granitemoe"
    architecture: ClassVar[str] = "GraniteMoeForCausalLM"
    fixed: ClassVar[Mapping[str, object]] = {"qk_norm": False, "mlp_bias": False}
    options: ClassVar[frozenset[str]] = frozenset(MULTIPLIERS.values())
    bias_key: ClassVar[str | None] = "attention_bias"
    experts_keys: ClassVar[tuple[str, ...]] = ("num_local_experts",)
    sparse_style: ClassVar[str] = "all"
    has_expert_width: ClassVar[bool] = False
    renormalises: ClassVar[bool | None] = True
    defaults: ClassVar[Mapping[str, object]] = {
        **{key: value for key, value in MOE_DEFAULTS.items() if key != "norm_topk_prob"},
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **dict.fromkeys(MULTIPLIERS, 1.0),
    }

    norm_topk_prob: bool = True

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, object]:
        values = super()._read(reader)
        return {**values, **read_multipliers(reader, values["head_dim"])}

    def _write_layout(self) -> dict[str, object]:
        return write_multipliers(self)
