"""qwen3_next, qwen3_5 and its mixture: gated delta rules between layers with gated attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from moecc.families.config import EngineReading, TensorNames, config_class
from moecc.families.decoder import ATTENTION_BIASES, DEFAULTS, PARTIAL, DecoderConfig, DeltaLayers
from moecc.families.mixture import TRANSFORMERS
from moecc.families.qwen import SharedExpertConfig
from moecc.families.reader import COUNT, LAYERS, KeyProblem, Reader, key_problem
from moecc.families.rope import ROPE_KEYS
from moecc.families.shrinking import SMALL_HEAD_DIM, SMALL_HEADS, shrink_size
from moecc.families.wrappers import without_sections
from moecc.support.untyped import JsonDict

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
NOT_EXAMINED = {
    name: EngineReading(never="not examined with this family")
    for name in ("vLLM", "SGLang", "llama.cpp", "mlx-lm")
}

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
        data = dict(reader.data)
        kinds = cls._read_kinds(reader)
        data.pop(LAYER_TYPES, None)
        for key in ROPE_KEYS[1:]:
            if key in data:
                data[key] = without_sections(data[key])
        values = super()._read(reader.with_data(data))
        sizes = {name: reader.size(key, COUNT) for name, key in SIZE_KEYS.items()}
        delta = DeltaLayers(kinds, **sizes, taps=reader.size(TAPS, MOST_TAPS))
        values["delta"] = delta if any(kinds) else None
        return values

    @classmethod
    def _read_kinds(cls, reader: Reader) -> tuple[bool, ...]:
        """Return for each layer whether it has a gated delta rule."""
        layers, interval = reader.size("num_hidden_layers", LAYERS), reader.size(INTERVAL, LAYERS)
        if reader.value(LAYER_TYPES) is None:
            return tuple((layer + 1) % interval != 0 for layer in range(layers))
        kinds = reader.items(LAYER_TYPES)
        if not all(isinstance(kind, str) and kind in HAS_DELTA_RULE for kind in kinds):
            expected = "linear_attention or full_attention"
            reader.refuse(LAYER_TYPES, "unknown kind of layer", expected=expected)
        elif len(kinds) != layers:
            fault = f"{len(kinds)} entries for {layers} layers"
            reader.refuse(LAYER_TYPES, fault, expected="an entry for each layer")
        return tuple(HAS_DELTA_RULE.get(str(kind), False) for kind in kinds)

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
    engines = {**TRANSFORMERS, **NOT_EXAMINED}
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
    fixed = {**_DeltaConfig.fixed, "norm_topk_prob": True}
    experts_keys = ("num_experts",)
    sparse_style = "all"
    engines = {"transformers 5": EngineReading(), **NOT_EXAMINED}
    defaults = {
        **MIXTURE_DEFAULTS,
        "vocab_size": 248_320,
        "num_hidden_layers": 40,
        "num_experts_per_tok": 8,
        "num_experts": 256,
    }
