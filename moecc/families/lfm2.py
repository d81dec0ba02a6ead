"""lfm2: short convolutions in most layers, attention with norms of each head in the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from moecc.families.config import TensorNames, config_class
from moecc.families.decoder import DEFAULTS, DecoderConfig
from moecc.families.reader import LAYERS, NEURONS, KeyProblem, Reader, key_problem, shown
from moecc.support.untyped import JsonDict

WIDTH = "intermediate_size"
LAYER_TYPES, TAPS, ATTENTION_LAYERS = "layer_types", "conv_L_cache", "full_attn_idxs"
ADJUST, MULTIPLIER, MULTIPLE = (
    *("block_auto_adjust_ff_dim", "block_ffn_dim_multiplier", "block_multiple_of"),
)
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
class Lfm2Config(DecoderConfig):
    """An lfm2; its width of a dense block is written as it is, not as what it is adjusted from."""

    model_type = "lfm2"
    architecture = "Lfm2ForCausalLM"
    fixed = {"qk_norm": True}
    options = frozenset({"conv_taps", "conv_bias"})
    keys = {"rms_norm_eps": "norm_eps", "hidden_act": ""}
    strict = ("num_key_value_heads",)
    always = {ADJUST: False}
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
    defaults = {**LFM2_DEFAULTS, ADJUST: True, MULTIPLIER: 1.0, MULTIPLE: 256}

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        # The first checkpoints have other names of these, which transformers prefers.
        data = dict(reader.data)
        for older, key in (("tie_embedding", "tie_word_embeddings"), ("block_ff_dim", WIDTH)):
            if reader.has(older):
                reader.used.add(key)
                data[key] = data[older]
        if reader.has("theta") and data["theta"] != reader.value("rope_theta"):
            fault = "transformers 4 takes it for rope_theta, and transformers 5 does not"
            stated = shown(reader.value("rope_theta"))
            reader.refuse("theta", fault, expected=f"{stated}, as in rope_theta")
        if data.get("head_dim", 1) is None:
            reader.refuse("head_dim", "transformers rejects null here", expected="a size")
        kinds = cls._read_kinds(reader.with_data(data))
        data.pop(LAYER_TYPES, None)
        values = super()._read(reader.with_data(data))
        taps = reader.size(TAPS, MOST_TAPS)
        if len(kinds) == values["num_hidden_layers"]:
            values["conv_taps"] = tuple(taps * is_convolution for is_convolution in kinds)
        if not any(kinds):
            values |= {"conv_taps": None, "conv_bias": False}
        return values | cls._read_width(reader, values["intermediate_size"])

    @classmethod
    def _read_kinds(cls, reader: Reader) -> tuple[bool, ...]:
        """Return for each layer whether it convolves."""
        stated = reader.items(LAYER_TYPES)
        if reader.value(LAYER_TYPES) is None:
            layers = reader.size("num_hidden_layers", LAYERS)
            attending = set(range(layers))
            if reader.value(ATTENTION_LAYERS) is not None:
                attending = set(reader.layer_numbers(ATTENTION_LAYERS))
            return tuple(layer not in attending for layer in range(layers))
        reader.used.add(ATTENTION_LAYERS)
        if not all(isinstance(kind, str) and kind in IS_CONVOLUTION for kind in stated):
            reader.refuse(LAYER_TYPES, "unknown kind of layer", expected="conv or full_attention")
        elif len(stated) != reader.value("num_hidden_layers"):
            fault = f"{len(stated)} entries for {reader.value('num_hidden_layers')} layers"
            reader.refuse(LAYER_TYPES, fault, expected="an entry for each layer")
        return tuple(IS_CONVOLUTION.get(str(kind), False) for kind in stated)

    @classmethod
    def _read_width(cls, reader: Reader, stated: int) -> JsonDict:
        """Return the width of a dense block, which transformers makes from what is stated."""
        if ADJUST not in cls.defaults or not reader.flag(ADJUST):
            return {}
        width = int(2 * stated / 3)
        if reader.value(MULTIPLIER) is not None:
            multiple = reader.size(MULTIPLE, NEURONS)
            width = int(reader.number(MULTIPLIER, above=0) * width)
            width = multiple * ((width + multiple - 1) // multiple)
        return {"intermediate_size": width}

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
