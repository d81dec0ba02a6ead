"""olmo2: norms after each block, and norms over all heads of queries and keys together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from .base import DEFAULTS, DecoderConfig
from .model import config_class


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
