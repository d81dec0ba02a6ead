"""lfm2 and lfm2_moe: short convolutions between layers with attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from moecc.families.config import (
    EngineReading,
    GgufFacts,
    ModelConfig,
    TensorNames,
    config_class,
)
from moecc.families.decoder import DEFAULTS, DecoderConfig
from moecc.families.mixture import UNEXAMINED, MoeConfig
from moecc.families.reader import LAYERS, NEURONS, KeyProblem, Reader, key_problem, shown
from moecc.support.untyped import JsonDict

if TYPE_CHECKING:
    from moecc.weights.expr import Expr

WIDTH = "intermediate_size"
LAYER_TYPES, TAPS, ATTENTION_LAYERS = "layer_types", "conv_L_cache", "full_attn_idxs"
ADJUST, MULTIPLIER, MULTIPLE = (
    *("block_auto_adjust_ff_dim", "block_ffn_dim_multiplier", "block_multiple_of"),
)
FLOORED = "a factor s / (s + 1e-06) on what experts add, s the sum of the chosen sigmoids"
GGUF_TAPS = ("shortconv.l_cache", TAPS)
IS_CONVOLUTION = {"conv": True, "full_attention": False}
MOST_TAPS = 64
"""More taps than any published model has: each is a product of its own."""

LFM2_DEFAULTS: Mapping[str, object] = {
    **{key: value for key, value in DEFAULTS.items() if key != "hidden_act"},
    "vocab_size": 65_536,
    "hidden_size": 2560,
    "intermediate_size": 12_288,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128_000,
    "norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
    "conv_bias": False,
    TAPS: 3,
}


@config_class
class _ConvolvedConfig(DecoderConfig):
    """A decoder in which layers of short convolutions stand between those with attention."""

    fixed = {"qk_norm": True}
    options = frozenset({"conv_taps", "conv_bias"})
    keys = {"rms_norm_eps": "norm_eps", "hidden_act": ""}
    strict = ("num_key_value_heads",)
    names = TensorNames(
        final_norm="model.embedding_norm.weight",
        dense="feed_forward.",
        dense_gate="w1",
        dense_up="w3",
        dense_down="w2",
        attention_output="out_proj",
        query_norm="q_layernorm",
        key_norm="k_layernorm",
        layer_norms=("operator_norm", "", "ffn_norm", ""),
    )

    # Names in the first checkpoints, which transformers prefers.
    older_keys: ClassVar[tuple[tuple[str, str], ...]] = (("tie_embedding", "tie_word_embeddings"),)

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        data = dict(reader.data)
        for older, key in cls.older_keys:
            if reader.has(older):
                reader.used.add(key)
                data[key] = data[older]
        if reader.has("theta") and data["theta"] != reader.value("rope_theta"):
            fault = "transformers 4 takes it for rope_theta, and transformers 5 does not"
            stated = shown(reader.value("rope_theta"))
            reader.refuse("theta", fault, expected=f"{stated}, as in rope_theta")
        if data.get("head_dim", 1) is None:
            reader.refuse("head_dim", "transformers rejects null here", expected="a size")
        reader = reader.with_data(data)
        kinds = cls._read_kinds(reader)
        values = super()._read(reader.without(LAYER_TYPES))
        taps = reader.size(TAPS, MOST_TAPS)
        values["conv_taps"] = tuple(taps * is_convolution for is_convolution in kinds)
        if not any(kinds):
            values |= {"conv_taps": None, "conv_bias": False}
        return values

    @classmethod
    def _read_kinds(cls, reader: Reader) -> tuple[bool, ...]:
        """Return for each layer whether it convolves."""
        layers = reader.size("num_hidden_layers", LAYERS)
        kinds = reader.layer_kinds(LAYER_TYPES, IS_CONVOLUTION, layers)
        if reader.value(LAYER_TYPES) is None:
            expected = f"{' or '.join(IS_CONVOLUTION)} for each layer"
            reader.refuse(LAYER_TYPES, "no kinds of layers", expected=expected)
        return kinds or (False,) * layers

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if self.hidden_act != "silu":
            fault = f"{self.model_type} has SwiGLU"
            yield key_problem(fault, "silu", self.hidden_act, "hidden_act")
        if len(counts := sorted(set(self.conv_taps or ()) - {0})) > 1:
            fault = f"{self.model_type} has as many taps in each convolution"
            yield key_problem(fault, "one number", f"{counts}", TAPS)

    def _write(self) -> JsonDict:
        taps = self.conv_taps or (0,) * self.num_hidden_layers
        kinds = ["conv" if count else "full_attention" for count in taps]
        return {**super()._write(), LAYER_TYPES: kinds, TAPS: max(taps) or 3}


@config_class
class Lfm2Config(_ConvolvedConfig):
    """An lfm2; its width of a dense block is written as it is, not as what it is adjusted from."""

    model_type = "lfm2"
    architecture = "Lfm2ForCausalLM"
    always = {ADJUST: False}
    gguf = GgufFacts(
        "lfm2",
        final_norm="token_embd_norm",
        fills_width=True,
        keys=(GGUF_TAPS,),
        states=((ADJUST, False), ("conv_bias", False)),
    )
    older_keys = (*_ConvolvedConfig.older_keys, ("block_ff_dim", WIDTH))
    defaults = {**LFM2_DEFAULTS, ADJUST: True, MULTIPLIER: 1.0, MULTIPLE: 256}

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        values = super()._read(reader)
        return values | cls._read_width(reader, values[WIDTH])

    @classmethod
    def _read_kinds(cls, reader: Reader) -> tuple[bool, ...]:
        if reader.value(LAYER_TYPES) is not None:
            reader.used.add(ATTENTION_LAYERS)
            return super()._read_kinds(reader)
        layers = reader.size("num_hidden_layers", LAYERS)
        if reader.value(ATTENTION_LAYERS) is None:
            return (False,) * layers
        attending = set(reader.whole_numbers(ATTENTION_LAYERS))
        return tuple(layer not in attending for layer in range(layers))

    @classmethod
    def _read_width(cls, reader: Reader, stated: int) -> JsonDict:
        """Return the width of a dense block, which transformers makes from what is stated."""
        if not reader.flag(ADJUST):
            return {}
        width = int(2 * stated / 3)
        if reader.value(MULTIPLIER) is not None:
            multiple = reader.size(MULTIPLE, NEURONS)
            width = int(reader.number(MULTIPLIER, above=0) * width)
            width = multiple * ((width + multiple - 1) // multiple)
        return {"intermediate_size": width}


@config_class
class Lfm2MoeConfig(_ConvolvedConfig, MoeConfig):
    """An lfm2_moe, whose chosen gates are divided by their sum and 10⁻⁶.

    A `plain` one is a model of another family, whose gates are divided by their sum alone.
    """

    model_type = "lfm2_moe"
    architecture = "Lfm2MoeForCausalLM"
    keys = {
        "gate_scale": "routed_scaling_factor",
        "router_aux_loss_coef": "",
        "routing_bias": "use_expert_bias",
    }
    experts_keys = ("num_experts",)
    sparse_style = "counted"
    score = "sigmoid"
    has_routing_bias = True
    gate_floor = 1e-6
    # Gates that are divided by their sum are equal up to the floor alone.
    upcycle_options = "top-k=2 gates=sigmoid router-init=zero"
    names = replace(
        _ConvolvedConfig.names,
        sparse="feed_forward.",
        gate="w1",
        up="w3",
        down="w2",
        routing_bias="expert_bias",
    )
    gguf = GgufFacts(
        "lfm2moe",
        final_norm="token_embd_norm",
        fills_width=True,
        keys=(("leading_dense_block_count", "num_dense_layers"), GGUF_TAPS),
        # Scores are sigmoids.
        fixed=(("expert_gating_func", 2),),
        states=(("conv_bias", False), ("routed_scaling_factor", 1.0)),
        needs_routing_bias=True,
    )
    engines = {
        "transformers 5": EngineReading(),
        **UNEXAMINED,
        "vLLM": EngineReading(differs="its short convolutions on a CPU compute something else"),
        "mlx-lm": EngineReading(("tied",), ("plain rope", "silu")),
    }
    defaults = {
        **LFM2_DEFAULTS,
        "hidden_size": 2048,
        "intermediate_size": 7168,
        "moe_intermediate_size": 1792,
        "num_dense_layers": 2,
        "num_experts_per_tok": 4,
        "num_experts": 32,
        "use_expert_bias": True,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
        "output_router_logits": False,
    }

    plain: bool = False

    @property
    def sum_floor(self) -> float:
        """What is added to the sum that the chosen gates are divided by."""
        return 0.0 if self.plain else super().sum_floor

    @classmethod
    def from_others(cls) -> dict[str, object]:
        """Return the fields of a model that comes from another family."""
        return {"plain": True}

    def completed(self) -> tuple[ModelConfig, dict[str, Expr]]:
        """Return what transformers reads, which divides by 10⁻⁶ more than a plain one."""
        return replace(self, plain=False), {}

    @property
    def others_up_to(self) -> str:
        """How far a model of another family is from itself in this one."""
        return FLOORED if self.norm_topk_prob else ""

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        return {**super()._read(reader), "routing_bias": reader.flag("use_expert_bias")}

    def _write(self) -> JsonDict:
        return {**super()._write(), "use_expert_bias": self.routing_bias}
