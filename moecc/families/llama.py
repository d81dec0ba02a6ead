"""llama and mistral: the plain decoder, and the same with a sliding window."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from moecc.families.config import config_class
from moecc.families.decoder import DEFAULTS, DecoderConfig
from moecc.families.mixture import MOE_DEFAULTS, MoeConfig
from moecc.families.reader import KeyProblem, Reader, key_problem


@config_class
class LlamaConfig(DecoderConfig):
    """A llama: optional biases on all four attention projections and in the feed-forward block."""

    model_type: ClassVar[str] = "llama"
    architecture: ClassVar[str] = "LlamaForCausalLM"
    fixed: ClassVar[Mapping[str, bool]] = {"qk_norm": False}
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
    }

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            what = "transformers 5 rejects such a llama, whatever its head_dim, but not a mistral"
            expected = f"a multiple of {self.num_attention_heads}"
            keys = ("hidden_size", "num_attention_heads", "head_dim")
            yield key_problem(what, expected, f"{self.hidden_size}", *keys)


@config_class
class MistralConfig(DecoderConfig):
    """A mistral: no biases, and one sliding window in every layer or in none."""

    model_type: ClassVar[str] = "mistral"
    architecture: ClassVar[str] = "MistralForCausalLM"
    fixed: ClassVar[Mapping[str, bool]] = {
        "qkv_bias": False,
        "output_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
    }
    window_style: ClassVar[str] = "uniform"
    defaults: ClassVar[Mapping[str, object]] = {
        **DEFAULTS,
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


# mixtral: a mistral whose every feed-forward block is a mixture of experts.


@config_class
class MixtralConfig(MoeConfig):
    """A mixtral: experts in every layer, gates always renormalised, no biases.

    `intermediate_size` is the width of an expert; both size fields hold it.
    """

    model_type: ClassVar[str] = "mixtral"
    architecture: ClassVar[str] = "MixtralForCausalLM"
    fixed: ClassVar[Mapping[str, bool]] = {
        "qkv_bias": False,
        "output_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
    }
    window_style: ClassVar[str] = "uniform"
    experts_keys: ClassVar[tuple[str, ...]] = ("num_local_experts",)
    sparse_style: ClassVar[str] = "all"
    has_expert_width: ClassVar[bool] = False
    renormalises: ClassVar[bool | None] = True
    defaults: ClassVar[Mapping[str, object]] = {
        **MOE_DEFAULTS,
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "norm_topk_prob": True,
        "router_jitter_noise": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }

    norm_topk_prob: bool = True

    @classmethod
    def _read_layout(cls, reader: Reader) -> dict[str, object]:
        return {"router_jitter_noise": reader.number("router_jitter_noise", least=0)}

    def _write_layout(self) -> dict[str, object]:
        return {"router_jitter_noise": self.router_jitter_noise}
