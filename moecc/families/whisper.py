"""whisper: an encoder of speech, and a decoder of text that reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from moecc.families.config import ModelConfig, activation_problem, config_class
from moecc.families.encdec import read_activation
from moecc.families.reader import (
    EXTRA_DEFAULTS,
    LARGEST_SIZES,
    KeyProblem,
    Reader,
    key_problem,
    refuse_attention_to_later_tokens,
)

SIZES = (
    "d_model",
    "num_mel_bins",
    "encoder_layers",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "decoder_layers",
    "decoder_attention_heads",
    "decoder_ffn_dim",
    "max_source_positions",
    "max_target_positions",
)


@config_class
class WhisperConfig(ModelConfig):
    """A whisper; `max_source_positions` is half the frames of its input, of which it takes all."""

    model_type: ClassVar[str] = "whisper"
    architecture: ClassVar[str] = "WhisperForConditionalGeneration"
    kind: ClassVar[str] = "an encoder of speech with a decoder"
    kept_numbers: ClassVar[tuple[str, ...]] = (
        "init_std",
        "activation_dropout",
        "attention_dropout",
        "dropout",
    )
    synonyms: ClassVar[Mapping[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_key_value_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
    }
    defaults: ClassVar[Mapping[str, object]] = {
        **EXTRA_DEFAULTS,
        "vocab_size": 51_865,
        "d_model": 384,
        "num_mel_bins": 80,
        "encoder_layers": 4,
        "encoder_attention_heads": 6,
        "encoder_ffn_dim": 1536,
        "decoder_layers": 4,
        "decoder_attention_heads": 6,
        "decoder_ffn_dim": 1536,
        "max_source_positions": 1500,
        "max_target_positions": 448,
        "activation_function": "gelu",
        "scale_embedding": False,
        "tie_word_embeddings": True,
        "is_encoder_decoder": True,
        "init_std": 0.02,
        "dropout": 0.0,
        "activation_dropout": 0.0,
        "pad_token_id": 50_256,
        "bos_token_id": 50_256,
        "eos_token_id": 50_256,
    }

    d_model: int
    num_mel_bins: int
    encoder_layers: int
    encoder_attention_heads: int
    encoder_ffn_dim: int
    decoder_layers: int
    decoder_attention_heads: int
    decoder_ffn_dim: int
    max_source_positions: int = 1500
    max_target_positions: int = 448
    hidden_act: str = "gelu"

    @classmethod
    def shape(cls) -> type[ModelConfig]:
        """Return the class whose fields all families of this shape of model share."""
        return cls

    @property
    def layer_norm_eps(self) -> float:
        """What norms add under the root; transformers states it nowhere."""
        return 1e-5

    def layers(self, stack: str) -> int:
        """Return the number of layers of ``encoder`` or ``decoder``."""
        return self.encoder_layers if stack == "encoder" else self.decoder_layers

    def heads(self, stack: str) -> tuple[int, int]:
        """Return the number of heads of a stack, and their width."""
        encoder, decoder = self.encoder_attention_heads, self.decoder_attention_heads
        count = encoder if stack == "encoder" else decoder
        return count, self.d_model // count

    def width(self, stack: str) -> int:
        """Return the width of a stack's feed-forward blocks."""
        return self.encoder_ffn_dim if stack == "encoder" else self.decoder_ffn_dim

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        for name in SIZES:
            value = getattr(self, name)
            if not 1 <= value <= LARGEST_SIZES[name]:
                expected = f"1 to {LARGEST_SIZES[name]:,}"
                yield key_problem("not a usable size", expected, f"{value}", name)
        for key in ("encoder_attention_heads", "decoder_attention_heads"):
            heads = getattr(self, key)
            if heads > 0 and self.d_model % heads:
                what, expected = "the heads do not divide the width", f"a multiple of {heads}"
                yield key_problem(what, expected, f"{self.d_model}", "d_model", key)
        yield from activation_problem(self.hidden_act, "activation_function")
        yield from super().checks()

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, object]:
        refuse_attention_to_later_tokens(reader)
        for key, value in (("scale_embedding", False), ("tie_word_embeddings", True)):
            if reader.flag(key) != value:
                what = "whisper ties its output matrix to an embedding that it does not scale"
                reader.refuse(key, what, expected=f"{value}".lower())
        if not reader.flag("is_encoder_decoder"):
            what = "a whisper without one of its halves is not supported"
            reader.refuse("is_encoder_decoder", what, expected="true")
        return {
            **super()._read(reader),
            **{name: reader.size(name) for name in SIZES},
            "hidden_act": read_activation(reader, "activation_function"),
        }

    def _write(self) -> dict[str, object]:
        return {
            **{name: getattr(self, name) for name in SIZES},
            "activation_function": self.hidden_act,
            "is_encoder_decoder": True,
            "scale_embedding": False,
            "tie_word_embeddings": True,
        }
