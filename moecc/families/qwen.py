"""qwen2 (and 2.5), qwen3, their mixtures; qwen3_next and qwen3_5, which have delta rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from moecc.families.config import (
    EngineReading,
    GgufFacts,
    MaxTextFacts,
    ModelConfig,
    TensorNames,
    config_class,
)
from moecc.families.decoder import ATTENTION_BIASES, DEFAULTS, PARTIAL, DecoderConfig, DeltaLayers
from moecc.families.mixture import MOE_DEFAULTS, TRANSFORMERS, UNEXAMINED, MoeConfig
from moecc.families.reader import COUNT, LAYERS, KeyProblem, Reader, key_problem
from moecc.families.rope import ROPE_KEYS
from moecc.families.shrinking import SMALL_HEAD_DIM, SMALL_HEADS, shrink_size
from moecc.families.wrappers import without_sections
from moecc.support.untyped import JsonDict

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
    gguf = GgufFacts("qwen2", fills_width=True)
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
    # Published files state what the family always has.
    only = {"use_qk_norm": (True, "a qwen3_moe always has norms of the queries and keys")}
    strict = ("num_key_value_heads",)
    window_style = "switched"
    # Version 4 writes num_experts, version 5 num_local_experts, and each reads its own.
    experts_keys = ("num_experts", "num_local_experts")
    gguf = GgufFacts("qwen3moe")
    maxtext = MaxTextFacts(biases=True)
    engines = {
        **TRANSFORMERS,
        "vLLM": EngineReading(("silu in dense blocks",), ("no attention biases", "silu")),
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


LAYER_TYPES, INTERVAL = "layer_types", "full_attention_interval"
HAS_DELTA_RULE = {"linear_attention": True, "full_attention": False}
MOST_TAPS = 64
"""More taps than any published model has: each is a product of its own."""

SIZE_KEYS = {
    "key_heads": "linear_num_key_heads",
    "value_heads": "linear_num_value_heads",
    "key_dim": "linear_key_head_dim",
    "value_dim": "linear_value_head_dim",
}
TAPS = "linear_conv_kernel_dim"
NO_BIASES = (("attention_bias", False),)

DELTA_DEFAULTS: Mapping[str, object] = {
    **DEFAULTS,
    "head_dim": 256,
    "max_position_embeddings": 32_768,
    PARTIAL: 0.25,
    INTERVAL: 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    TAPS: 4,
}
MIXTURE_DEFAULTS: Mapping[str, object] = {
    **DELTA_DEFAULTS,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}


@config_class
class _DeltaConfig(DecoderConfig):
    """A decoder in which layers of gated delta rules stand between those with gated attention."""

    fixed = {"qk_norm": True, "norm_offset": True, "attention_gate": True}
    options = ATTENTION_BIASES | {"rotary_dim", "delta"}
    strict = ("num_key_value_heads", "head_dim")
    only = {"attn_output_gate": (True, "transformers gates the output of every attention")}
    # What other code reads: its types, and the layer of the next line.
    idle = ("mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
    # Tensors of the layer that predicts the token after the next, which transformers ignores.
    unread = r"mtp\..*"

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        kinds = cls._read_kinds(reader)
        data = dict(reader.without(LAYER_TYPES).data)
        data |= {key: without_sections(data[key]) for key in ROPE_KEYS[1:] if key in data}
        values = super()._read(reader.with_data(data))
        sizes = {name: reader.size(key, COUNT) for name, key in SIZE_KEYS.items()}
        delta = DeltaLayers(kinds, **sizes, taps=reader.size(TAPS, MOST_TAPS))
        values["delta"] = delta if any(kinds) else None
        return values

    @classmethod
    def _read_kinds(cls, reader: Reader) -> tuple[bool, ...]:
        """Return for each layer whether it has a gated delta rule."""
        layers, interval = reader.size("num_hidden_layers", LAYERS), reader.size(INTERVAL, LAYERS)
        kinds = reader.layer_kinds(LAYER_TYPES, HAS_DELTA_RULE, layers)
        return kinds or tuple((layer + 1) % interval != 0 for layer in range(layers))

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        delta = self.delta
        if delta is not None and delta.value_heads % delta.key_heads:
            fault = "the value heads are not a multiple of the key heads"
            keys = (SIZE_KEYS["value_heads"], SIZE_KEYS["key_heads"])
            yield key_problem(
                fault, f"a multiple of {delta.key_heads}", f"{delta.value_heads}", *keys
            )

    def small_sizes(self) -> JsonDict:
        """Return the fields that are other in a small model of the same structure."""
        sizes, delta = super().small_sizes(), self.delta
        if delta is None:
            return sizes
        key_heads = shrink_size(delta.key_heads, SMALL_HEADS)
        groups = shrink_size(delta.value_heads // delta.key_heads, SMALL_HEADS)
        small = replace(
            delta,
            key_heads=key_heads,
            value_heads=key_heads * groups,
            key_dim=shrink_size(delta.key_dim, SMALL_HEAD_DIM),
            value_dim=shrink_size(delta.value_dim, SMALL_HEAD_DIM),
        )
        return {**sizes, "delta": small}

    def _write(self) -> JsonDict:
        delta = self.delta
        kinds = (False,) * self.num_hidden_layers if delta is None else delta.layers
        names = ["linear_attention" if has_rule else "full_attention" for has_rule in kinds]
        keys: JsonDict = {**super()._write(), LAYER_TYPES: names}
        if delta is None:
            return keys
        sizes = {key: getattr(delta, name) for name, key in SIZE_KEYS.items()}
        return {**keys, **sizes, TAPS: delta.taps}


@config_class
class Qwen3NextConfig(_DeltaConfig, SharedExpertConfig):
    """A qwen3_next: a mixture, whose projections of the delta rule lie by key heads."""

    model_type = "qwen3_next"
    architecture = "Qwen3NextForCausalLM"
    experts_keys = ("num_experts",)
    names = TensorNames(delta_by_group=True)
    gguf = GgufFacts("qwen3next", ffn_norm="post_attention_norm", states=NO_BIASES)
    engines = {
        **TRANSFORMERS,
        **UNEXAMINED,
        "mlx-lm": EngineReading(("every fourth layer",), ("silu",)),
    }
    defaults = {
        **MIXTURE_DEFAULTS,
        "num_hidden_layers": 48,
        "num_experts_per_tok": 10,
        "num_experts": 512,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
    }

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if self.delta is not None and self.hidden_act != "silu":
            fault = "transformers 4 has silu behind each short convolution, and 5 what this says"
            yield key_problem(fault, "silu", self.hidden_act, "hidden_act")


@config_class
class Qwen35TextConfig(_DeltaConfig):
    """A dense qwen3_5, alone or beside its encoder of images."""

    model_type = "qwen3_5_text"
    architecture = "Qwen3_5ForCausalLM"
    gguf = GgufFacts("qwen35", ffn_norm="post_attention_norm", states=NO_BIASES)
    defaults = {
        **DELTA_DEFAULTS,
        "vocab_size": 248_320,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    }


@config_class
class Qwen35MoeTextConfig(_DeltaConfig, SharedExpertConfig):
    """A qwen3_5_moe, alone or beside its encoder of images: experts in every layer."""

    model_type = "qwen3_5_moe_text"
    architecture = "Qwen3_5MoeForCausalLM"
    gguf = GgufFacts("qwen35moe", ffn_norm="post_attention_norm", states=NO_BIASES)
    fixed = {**_DeltaConfig.fixed, "norm_topk_prob": True}
    experts_keys = ("num_experts",)
    sparse_style = "all"
    engines = {
        "transformers 5": EngineReading(),
        **UNEXAMINED,
        "mlx-lm": EngineReading(never="it reads the family in its wrapper alone"),
    }
    defaults = {
        **MIXTURE_DEFAULTS,
        "vocab_size": 248_320,
        "num_hidden_layers": 40,
        "num_experts_per_tok": 8,
        "num_experts": 256,
    }
