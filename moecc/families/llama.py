"""llama, mistral and mixtral: the plain decoder, with a sliding window, with experts."""

from __future__ import annotations

from collections.abc import Iterator

from moecc.families.config import EngineReading, GgufFacts, MaxTextFacts, TensorNames, config_class
from moecc.families.decoder import BIASES, DEFAULTS, DecoderConfig
from moecc.families.mixture import MOE_DEFAULTS, ONE_WIDTH, TRANSFORMERS, MoeConfig
from moecc.families.reader import KeyProblem, key_problem


@config_class
class LlamaConfig(DecoderConfig):
    """A llama: optional biases on all four attention projections and in the feed-forward block."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    options = BIASES
    gguf = GgufFacts("llama", pairs_neighbours=True, output_bias=True, mlp_bias=True)
    maxtext = MaxTextFacts(folds_scale=True)
    defaults = {
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
            fault = "transformers 5 rejects such a llama, whatever its head_dim, but not a mistral"
            expected = f"a multiple of {self.num_attention_heads}"
            keys = ("hidden_size", "num_attention_heads", "head_dim")
            yield key_problem(fault, expected, f"{self.hidden_size}", *keys)


@config_class
class MistralConfig(DecoderConfig):
    """A mistral: no biases, and one sliding window in every layer or in none."""

    model_type = "mistral"
    architecture = "MistralForCausalLM"
    window_style = "uniform"
    gguf = LlamaConfig.gguf
    maxtext = MaxTextFacts(folds_scale=True)
    defaults = {
        **DEFAULTS,
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


@config_class
class MixtralConfig(MoeConfig):
    """A mixtral: a mistral with experts in every layer, gates always renormalised.

    `intermediate_size` is the width of an expert; both size fields hold it.
    """

    model_type = "mixtral"
    architecture = "MixtralForCausalLM"
    fixed = {"norm_topk_prob": True}
    keys = {**ONE_WIDTH, "router_jitter_noise": "router_jitter_noise"}
    window_style = "uniform"
    experts_keys = ("num_local_experts",)
    sparse_style = "all"
    names = TensorNames(sparse="block_sparse_moe.", gate="w1", up="w3", down="w2")
    gguf = GgufFacts("llama", pairs_neighbours=True)
    maxtext = MaxTextFacts(folds_scale=True)
    engines = {
        **TRANSFORMERS,
        "vLLM": EngineReading(silent=("silu",)),
        "SGLang": EngineReading(
            ("plain heads",), ("untied", "full attention", "plain rope", "silu")
        ),
        "mlx-lm": EngineReading(("plain heads",), ("full attention", "plain rope", "silu")),
    }
    defaults = {
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
