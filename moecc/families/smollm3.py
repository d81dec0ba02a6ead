"""smollm3: a llama some of whose layers have no rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from moecc.families.config import config_class
from moecc.families.decoder import DEFAULTS, DecoderConfig, Windows, typed_windows
from moecc.families.reader import Reader


@config_class
class SmolLM3Config(DecoderConfig):
    """A smollm3; every fourth layer has no rotary positions unless `no_rope_layers` says other."""

    model_type: ClassVar[str] = "smollm3"
    architecture: ClassVar[str] = "SmolLM3ForCausalLM"
    fixed: ClassVar[Mapping[str, object]] = {"qk_norm": False}
    options: ClassVar[frozenset[str]] = frozenset({"rope_layers"})
    bias_key: ClassVar[str | None] = "attention_bias"
    window_style: ClassVar[str] = "typed"
    defaults: ClassVar[Mapping[str, object]] = {
        **DEFAULTS,
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
        "sliding_window": None,
        "no_rope_layer_interval": 4,
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
        "pad_token_id": 128_004,
    }

    @classmethod
    def _read_rope(cls, reader: Reader, head_dim: int) -> dict[str, object]:
        layers = reader.size("num_hidden_layers")
        found = _rope_layers(reader, layers)
        kept = None if all(found) else found
        return {**super()._read_rope(reader, head_dim), "rope_layers": kept}

    @classmethod
    def _read_windows(cls, reader: Reader, layers: int) -> Windows:
        """Read the windows; without `layer_types`, layers without rotary positions have one."""
        if not reader.flag("use_sliding_window"):
            reader.value("sliding_window")
            if "sliding_attention" in reader.items("layer_types"):
                what = "transformers gives these layers a window in spite of use_sliding_window"
                hint = "set use_sliding_window to true, or make every layer full_attention"
                reader.refuse("layer_types", what, expected="full_attention", hint=hint)
            return (None,) * layers
        return typed_windows(reader, tuple(not rope for rope in _rope_layers(reader, layers)))

    def _write(self) -> dict[str, object]:
        layers = self.rope_layers or (True,) * self.num_hidden_layers
        return {
            **super()._write(),
            "no_rope_layers": [int(rope) for rope in layers],
            "use_sliding_window": any(self.sliding_windows),
        }


def _rope_layers(reader: Reader, layers: int) -> tuple[bool, ...]:
    """Return for each layer whether it has rotary positions, as ``no_rope_layers`` says it."""
    interval = reader.size("no_rope_layer_interval")
    usual = tuple((layer + 1) % interval != 0 for layer in range(layers))
    if reader.value("no_rope_layers") is None:
        return usual
    found = reader.items("no_rope_layers")
    if len(found) < layers or not all(flag in (0, 1) for flag in found):
        reader.refuse("no_rope_layers", "not 0 or 1 for each layer", expected=f"{layers} of them")
        return usual
    return tuple(bool(flag) for flag in found[:layers])
