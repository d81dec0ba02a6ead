"""olmo to olmo3, olmoe, flex_olmo: norms over all heads of the queries; exaone4, of each head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from moecc.families.config import EngineReading, GgufFacts, config_class
from moecc.families.decoder import ATTENTION_BIASES, DEFAULTS, DecoderConfig
from moecc.families.mixture import MOE_DEFAULTS, ONE_WIDTH, TRANSFORMERS, MoeConfig
from moecc.families.reader import LAYERS, KeyProblem, Reader, key_problem
from moecc.families.rope import RopeConfig, refuse_former_name
from moecc.support.untyped import JsonDict


@config_class
class OlmoConfig(DecoderConfig):
    """An olmo: norms without parameters, queries, keys and values within bounds."""

    model_type = "olmo"
    architecture = "OlmoForCausalLM"
    fixed = {"norm_kind": "layer without parameters", "rms_norm_eps": 1e-5}
    options = ATTENTION_BIASES | {"qkv_clip"}
    gguf = GgufFacts(
        "olmo",
        pairs_neighbours=True,
        unread_ropes=("llama3",),
        fills_width=True,
        optional_keys=(("attention.clamp_kqv", "clip_qkv", None),),
        states=(("attention_bias", False),),
    )
    keys = {"rms_norm_eps": ""}
    defaults = {
        **DEFAULTS,
        "vocab_size": 50_304,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "clip_qkv": None,
        "pad_token_id": 1,
        "eos_token_id": 50_279,
    }

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if self.rms_norm_eps != self.fixed["rms_norm_eps"]:
            fault = "transformers computes with 1e-5 whatever the config says"
            yield key_problem(fault, "1e-05", f"{self.rms_norm_eps:g}", "rms_norm_eps")


@config_class
class Olmo2Config(DecoderConfig):
    """An olmo2: what a block adds is normalised, what it reads is not."""

    model_type = "olmo2"
    architecture = "Olmo2ForCausalLM"
    fixed = {"qk_norm": True, "qk_norm_across": True, "norm_placement": "after"}
    options = ATTENTION_BIASES
    gguf: ClassVar[GgufFacts | None] = GgufFacts(
        "olmo2", unread_ropes=("linear",), fills_width=True, needs_head=True
    )
    defaults = {
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

    def _write_rope(self) -> JsonDict:
        keys = super()._write_rope()
        if self.rope.type in ("linear", "dynamic"):
            # Version 4 takes the scalings that it knows by their older name.
            keys["rope_scaling"] = {"type": self.rope.type, "factor": self.rope.factor}
        return keys


KINDS = ("full_attention", "sliding_attention")
"""The kinds of layers, which have rotary parameters each."""


@config_class
class Olmo3Config(Olmo2Config):
    """An olmo3: a window in three of four layers, whose rotary positions are never scaled."""

    model_type = "olmo3"
    architecture = "Olmo3ForCausalLM"
    window_style = "typed"
    gguf = None
    defaults = {
        **Olmo2Config.defaults,
        "rope_theta": 500_000.0,
        "sliding_window": 4096,
    }

    def rope_of(self, layer: int) -> RopeConfig | None:
        """Return the rotary positions of a layer."""
        has_window = self.sliding_windows[layer] is not None
        return RopeConfig(theta=self.rope.theta) if has_window else self.rope

    @classmethod
    def _usual_windows(cls, reader: Reader, layers: int) -> tuple[bool, ...]:
        return tuple((n + 1) % 4 != 0 for n in range(layers))

    @classmethod
    def _read_rope(cls, reader: Reader, values: JsonDict) -> JsonDict:
        refuse_former_name(reader)
        parameters = reader.mapping("rope_parameters")
        if parameters is None:
            theta = reader.number("rope_theta", above=0)
            if theta != cls.defaults["rope_theta"]:
                fault = "transformers 5 takes 500000 for layers with a window, 4 this"
                hint = "state rope_parameters for either kind of layer"
                reader.refuse("rope_theta", fault, expected="500000", hint=hint)
            return super()._read_rope(reader, values)
        full, local = (parameters.get(kind) for kind in KINDS)
        if not isinstance(full, Mapping) or not isinstance(local, Mapping):
            expected = f"an object for {' and '.join(KINDS)}"
            reader.refuse("rope_parameters", "not stated by kind of layer", expected=expected)
            return super()._read_rope(reader.with_data({}), values)
        plain = RopeConfig(theta=full.get("rope_theta", 0)).to_json()["rope_parameters"]
        if dict(local) != plain:
            fault = "transformers 4 has one base period, and no scaling in layers with a window"
            reader.refuse("rope_parameters", fault, expected=f"{KINDS[1]} {plain}")
        return super()._read_rope(
            reader.with_data({**reader.data, "rope_parameters": full}), values
        )

    def _write_rope(self) -> JsonDict:
        keys = super()._write_rope()
        local = RopeConfig(theta=self.rope.theta).to_json()["rope_parameters"]
        ropes = dict(zip(KINDS, (keys["rope_parameters"], local), strict=True))
        return {**keys, "rope_parameters": ropes}


@config_class
class OlmoeConfig(MoeConfig):
    """An olmoe: experts in every layer, norms before each block; `clip_qkv` is not supported."""

    model_type = "olmoe"
    architecture = "OlmoeForCausalLM"
    fixed = {"qk_norm": True, "qk_norm_across": True}
    options = ATTENTION_BIASES
    keys = ONE_WIDTH
    experts_keys = ("num_experts",)
    sparse_style = "all"
    gguf = GgufFacts(
        "olmoe", has_groups=False, fills_width=True, needs_head=True, renormalises=False
    )
    engines = {
        **TRANSFORMERS,
        "vLLM": EngineReading(
            ("plain heads",),
            ("no attention biases", "not renormalised", "untied", "epsilon 1e-5", "silu"),
        ),
        "SGLang": EngineReading(
            ("plain heads",), ("no attention biases", "not renormalised", "untied", "silu")
        ),
        "mlx-lm": EngineReading(silent=("usual rope factor", "silu")),
    }
    defaults = {
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


@config_class
class FlexOlmoConfig(MoeConfig):
    """A flex_olmo: the mixture of experts of an olmo2, whose norms come after each block."""

    # vLLM has it through its backend for models of transformers, which was not looked at.
    model_type = "flex_olmo"
    architecture = "FlexOlmoForCausalLM"
    fixed = Olmo2Config.fixed
    options = ATTENTION_BIASES
    keys = ONE_WIDTH
    experts_keys = ("num_experts",)
    sparse_style = "all"
    defaults = {
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


@config_class
class Exaone4Config(DecoderConfig):
    """An exaone4: norms of each head; without any window all layers have rotary positions."""

    model_type = "exaone4"
    architecture = "Exaone4ForCausalLM"
    fixed = {"norm_placement": "after", "qk_norm": True}
    window_style = "typed"
    # llama.cpp knows the window of a model of 64 layers, and no key for it.
    gguf = GgufFacts("exaone4", fills_width=True)
    strict = ("num_key_value_heads",)
    defaults = {
        **DEFAULTS,
        "vocab_size": 102_400,
        "hidden_size": 4096,
        "intermediate_size": 16_384,
        "num_key_value_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }

    def rope_of(self, layer: int) -> RopeConfig | None:
        """Return the rotary positions of a layer, or None if it has none."""
        has_rope = self.sliding_windows[layer] is not None or not any(self.sliding_windows)
        return self.rope if has_rope else None

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        values = super()._read(reader)
        if reader.value("sliding_window") is not None and not any(values["sliding_windows"]):
            fault = "no layer has the window, and transformers rotates none for that reason"
            reader.refuse("sliding_window", fault, expected="null, or a layer with the window")
        return values

    def _write(self) -> JsonDict:
        window = next(filter(None, self.sliding_windows), None)
        return {**super()._write(), "sliding_window": window}

    @classmethod
    def _usual_windows(cls, reader: Reader, layers: int) -> tuple[bool, ...]:
        if reader.value("layer_types") is not None or reader.value("sliding_window") is None:
            # Some checkpoints state the pattern in letters beside the list.
            reader.value("sliding_window_pattern")
            return (False,) * layers
        period = reader.size("sliding_window_pattern", LAYERS)
        return tuple((n + 1) % period != 0 for n in range(layers))
