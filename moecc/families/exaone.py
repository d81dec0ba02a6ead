"""exaone4: norms after each block, rotary positions in layers with a window alone."""

from __future__ import annotations

from moecc.families.config import GgufFacts, config_class
from moecc.families.decoder import DEFAULTS, DecoderConfig
from moecc.families.reader import LAYERS, Reader
from moecc.families.rope import RopeConfig
from moecc.support.untyped import JsonDict


@config_class
class Exaone4Config(DecoderConfig):
    """An exaone4: norms of each head; without any window all layers have rotary positions."""

    model_type = "exaone4"
    architecture = "Exaone4ForCausalLM"
    fixed = {"norm_placement": "after", "qk_norm": True}
    window_style = "typed"
    # llama.cpp knows the window of a model of 64 layers, and no key for it.
    gguf = GgufFacts("exaone4")
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
