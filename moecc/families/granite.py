"""granite: a llama with factors on the embedding, the scores, the residual and the logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from moecc.families.config import config_class
from moecc.families.decoder import DEFAULTS, DecoderConfig
from moecc.families.mixture import MOE_DEFAULTS, MoeConfig
from moecc.families.reader import Reader

MULTIPLIERS: Mapping[str, str] = {
    "embedding_multiplier": "embedding_multiplier",
    "residual_multiplier": "residual_multiplier",
    "attention_multiplier": "attention_scale",
    "logits_scaling": "logits_divisor",
}
"""The keys of the factors, and their fields."""


@config_class
class GraniteConfig(DecoderConfig):
    """A granite; its scores are multiplied by a factor, by default 1."""

    model_type: ClassVar[str] = "granite"
    architecture: ClassVar[str] = "GraniteForCausalLM"
    fixed: ClassVar[Mapping[str, object]] = {"qk_norm": False}
    options: ClassVar[frozenset[str]] = frozenset(MULTIPLIERS.values())
    bias_key: ClassVar[str | None] = "attention_bias"
    defaults: ClassVar[Mapping[str, object]] = {
        **DEFAULTS,
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **dict.fromkeys(MULTIPLIERS, 1.0),
    }

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, object]:
        values = super()._read(reader)
        return {**values, **read_multipliers(reader, values["head_dim"])}

    def _write(self) -> dict[str, object]:
        return {**super()._write(), **write_multipliers(self)}


def read_multipliers(reader: Reader, head_dim: object) -> dict[str, object]:
    """Return the fields of the factors of granite; the usual scale of the scores is None."""
    found = {field: reader.number(key, above=0) for key, field in MULTIPLIERS.items()}
    usual = isinstance(head_dim, int) and found["attention_scale"] == head_dim**-0.5
    return {**found, "attention_scale": None} if usual else {**found}


def write_multipliers(config: DecoderConfig) -> dict[str, object]:
    """Return the keys of the factors of granite, which always states that on the scores."""
    keys: dict[str, object] = {key: getattr(config, field) for key, field in MULTIPLIERS.items()}
    return {**keys, "attention_multiplier": config.score_scale}


# granitemoe: a granite whose every feed-forward block is a mixture of experts.


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
