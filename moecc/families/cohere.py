"""cohere and cohere2: blocks side by side behind one norm without a bias, scaled logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from moecc.families.config import GgufFacts, TensorNames, config_class
from moecc.families.decoder import ATTENTION_BIASES, DEFAULTS, DecoderConfig
from moecc.families.reader import LAYERS, Reader
from moecc.families.rope import RopeConfig
from moecc.support.untyped import JsonDict

LOGITS = "logit_scale"
SCALE, NO_BIASES = (LOGITS, LOGITS), (("attention_bias", False),)

COHERE_DEFAULTS: Mapping[str, object] = {
    **DEFAULTS,
    "vocab_size": 256_000,
    "hidden_size": 8192,
    "intermediate_size": 22_528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "num_key_value_heads": None,
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    LOGITS: 0.0625,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 5,
    "eos_token_id": 255_001,
}


@config_class
class CohereConfig(DecoderConfig):
    """A cohere: neighbours rotated; norms of queries and keys have a scale for each head."""

    model_type = "cohere"
    architecture = "CohereForCausalLM"
    fixed = {"norm_kind": "layer without bias", "parallel": True, "qk_norm_each": True}
    options = ATTENTION_BIASES | {"qk_norm", "logits_divisor"}
    keys = {"rms_norm_eps": "layer_norm_eps", "qk_norm": "use_qk_norm", "logits_divisor": ""}
    names = TensorNames(pairs_neighbours=True)
    gguf: ClassVar[GgufFacts | None] = GgufFacts(
        "command-r",
        is_tied=True,
        fills_width=True,
        keys=(SCALE,),
        states=(*NO_BIASES, ("use_qk_norm", False)),
    )
    defaults = {**COHERE_DEFAULTS, "rope_theta": 500_000.0, "use_qk_norm": False}

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        return {**super()._read(reader), "logits_divisor": 1 / reader.number(LOGITS, above=0)}

    def _write(self) -> JsonDict:
        return {**super()._write(), LOGITS: 1 / self.logits_divisor}


@config_class
class Cohere2Config(CohereConfig):
    """A cohere2: a window in three of four layers, which alone have rotary positions."""

    model_type = "cohere2"
    architecture = "Cohere2ForCausalLM"
    options = ATTENTION_BIASES | {"logits_divisor"}
    window_style = "typed"
    gguf = GgufFacts(
        "cohere2",
        is_tied=True,
        window_period=4,
        keys=(SCALE, ("attention.sliding_window", "sliding_window")),
        states=NO_BIASES,
    )
    plain_heads = "cohere2 has heads of hidden_size / num_attention_heads"
    defaults = {
        **COHERE_DEFAULTS,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
    }

    def rope_of(self, layer: int) -> RopeConfig | None:
        """Return the rotary positions of a layer, or None if it has none."""
        return self.rope if self.sliding_windows[layer] is not None else None

    @classmethod
    def _usual_windows(cls, reader: Reader, layers: int) -> tuple[bool, ...]:
        period = reader.size("sliding_window_pattern", LAYERS)
        return tuple((n + 1) % period != 0 for n in range(layers))
