"""qwen2 (and 2.5), qwen3, and their mixtures."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from moecc.families.config import EngineReading, GgufFacts, MaxTextFacts, ModelConfig, config_class
from moecc.families.decoder import ATTENTION_BIASES, DEFAULTS, DecoderConfig
from moecc.families.mixture import MOE_DEFAULTS, TRANSFORMERS, MoeConfig

if TYPE_CHECKING:
    from moecc.weights.expr import Expr

ZERO_WIDTH = 128
"""The width of a shared expert of zeros: eight devices divide it, and blocks of 32 weights do."""


@config_class
class Qwen2Config(DecoderConfig):
    """A qwen2: biases on query, key and value, and a sliding window in the upper layers."""

    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
    fixed = {"qkv_bias": True}
    window_style = "top"
    gguf = GgufFacts("qwen2")
    maxtext = MaxTextFacts(biases=True)
    defaults = {
        **DEFAULTS,
        "hidden_size": 4096,
        "intermediate_size": 22_016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32_768,
    }


@config_class
class SharedExpertConfig(MoeConfig):
    """A mixture with a shared expert behind a sigmoid gate, which a model without one gets."""

    has_shared_expert = True
    shared_is_optional = True
    sparse_style = "step"
    upcycle_options = "top-k=2 shared=0.5"

    @property
    def is_complete(self) -> bool:
        """Whether there is a shared expert, which every file of the family has."""
        return self.shared_expert_intermediate_size is not None

    def completed(self) -> tuple[ModelConfig, dict[str, Expr]]:
        """Return the config and the tensors with a shared expert, of zeros if the model has none.

        Every engine reads one.
        """
        config, tensors = super().completed()
        if self.shared_expert_intermediate_size is not None:
            return config, tensors
        names, embed = self.names, self.hidden_size
        width = min(ZERO_WIDTH, self.expert_intermediate_size)
        for layer, is_sparse in enumerate(self.sparse_layers):
            if not is_sparse:
                continue
            prefix = names.layer.format(layer=layer) + names.sparse
            tensors[f"{prefix}{names.shared_gate}"] = zeros(gate=1, embed=embed)
            for matrix in (names.gate, names.up):
                name = f"{prefix}{names.shared}{matrix}.weight"
                tensors[name] = zeros(mlp=width, embed=embed)
            down = f"{prefix}{names.shared}{names.down}.weight"
            tensors[down] = zeros(embed=embed, mlp=width)
        changes = {"shared_expert_intermediate_size": width}
        return replace(config, **changes), tensors  # type: ignore[arg-type]


def zeros(**axes: int) -> Expr:
    """Return a weight of zeros."""
    # Weights import NumPy, which takes longer than everything that reads a config.
    from moecc.types import F32, tensor
    from moecc.weights.expr import Full

    return Full(0.0, tensor(F32, **axes))


@config_class
class Qwen2MoeConfig(SharedExpertConfig):
    """A qwen2_moe: a shared expert with a sigmoid gate beside the routed ones."""

    model_type = "qwen2_moe"
    architecture = "Qwen2MoeForCausalLM"
    options = frozenset({"qkv_bias"})
    keys = {"qkv_bias": "qkv_bias"}
    strict = ("num_key_value_heads",)
    window_style = "agreed"
    # transformers 4 raises for others, and other runtimes do not read the key.
    plain_heads = "qwen2_moe has heads of hidden_size / num_attention_heads"
    experts_keys = ("num_experts",)
    gguf = GgufFacts("qwen2moe", needs_head=True, renormalises=False)
    engines = {
        **TRANSFORMERS,
        "vLLM": EngineReading(("silu",), ("qkv biases",)),
        "SGLang": EngineReading(("silu", "every layer"), ("untied", "full attention")),
        "mlx-lm": EngineReading(
            ("untied", "every layer", "qkv biases", "plain rope"),
            ("not renormalised", "full attention", "silu"),
        ),
    }
    defaults = {
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

    def completed(self) -> tuple[ModelConfig, dict[str, Expr]]:
        """Return the config and the tensors with the parts that engines always build.

        vLLM and mlx-lm read biases of queries, keys and values, and every engine a shared expert;
        zeros stand for those that the model lacks.
        """
        config, tensors = super().completed()
        if self.qkv_bias:
            return config, tensors
        heads = (self.num_attention_heads, self.num_key_value_heads, self.num_key_value_heads)
        for layer in range(self.num_hidden_layers):
            prefix = self.names.layer.format(layer=layer)
            for letter, count in zip("qkv", heads, strict=True):
                bias = zeros(heads=count * self.head_dim)
                tensors[f"{prefix}self_attn.{letter}_proj.bias"] = bias
        return replace(config, qkv_bias=True), tensors  # type: ignore[call-arg]


@config_class
class Qwen3Config(DecoderConfig):
    """A qwen3: norms of queries and keys over each head's width, optional attention biases."""

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    fixed = {"qk_norm": True}
    options = ATTENTION_BIASES
    strict = ("head_dim",)
    window_style = "top"
    gguf = GgufFacts("qwen3")
    maxtext = MaxTextFacts(biases=True)
    defaults = {
        **DEFAULTS,
        "hidden_size": 4096,
        "intermediate_size": 22_016,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32_768,
    }


@config_class
class Qwen3MoeConfig(MoeConfig):
    """A qwen3_moe: qwen3's attention, routed experts without a shared one."""

    model_type = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    fixed = {"qk_norm": True}
    options = ATTENTION_BIASES
    strict = ("num_key_value_heads",)
    window_style = "switched"
    # Version 4 writes num_experts, version 5 num_local_experts, and each reads its own.
    experts_keys = ("num_experts", "num_local_experts")
    gguf = GgufFacts("qwen3moe")
    maxtext = MaxTextFacts(biases=True)
    engines = {
        **TRANSFORMERS,
        "vLLM": EngineReading(("silu",), ("no attention biases",)),
        "SGLang": EngineReading(("every layer", "silu"), ("untied", "full attention")),
        "mlx-lm": EngineReading(("no attention biases",), ("full attention", "plain rope", "silu")),
    }
    defaults = {
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
