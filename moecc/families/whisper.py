"""whisper: an encoder of speech, and a decoder of text that reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import lcm
from typing import ClassVar

from moecc.families.config import CAUSAL, ModelConfig, TensorNames, activation, config_class, size
from moecc.families.encdec import STACKS
from moecc.families.heads import CLASSIFIER
from moecc.families.reader import (
    COUNT,
    EXTRA_DEFAULTS,
    LAYERS,
    LENGTH,
    NEURONS,
    WIDTH,
    KeyProblem,
    Reader,
)
from moecc.families.shrinking import (
    SMALL_HEAD_DIM,
    SMALL_HEADS,
    SMALL_MLP,
    SMALL_VOCAB,
    shrink_size,
)
from moecc.support.untyped import JsonDict

AUDIO_CLASSIFICATION = "WhisperForAudioClassification"
TIE = "whisper ties its output matrix to an embedding that it does not scale"


@config_class
class TwoStackConfig(ModelConfig):
    """An encoder and a decoder with layer norms, whose sizes may differ."""

    stacks = STACKS
    keys = {"hidden_act": "activation_function"}
    synonyms: ClassVar[Mapping[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_key_value_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
    }

    d_model: int = size(WIDTH)
    encoder_layers: int = size(LAYERS)
    encoder_attention_heads: int = size(COUNT)
    encoder_ffn_dim: int = size(NEURONS)
    decoder_layers: int = size(LAYERS)
    decoder_attention_heads: int = size(COUNT)
    decoder_ffn_dim: int = size(NEURONS)
    hidden_act: str = activation(default="gelu")

    @classmethod
    def shape(cls) -> type[ModelConfig]:
        """Return the class whose fields all families of this shape of model share."""
        return cls

    @property
    def layer_norm_eps(self) -> float:
        """The epsilon of the norms; transformers states it nowhere."""
        return 1e-5

    def layers(self, stack: str) -> int:
        """Return the number of layers of ``encoder`` or ``decoder``."""
        return self.encoder_layers if stack == "encoder" else self.decoder_layers

    def layers_key(self, stack: str) -> str:
        """Return the key of that number in config.json."""
        return f"{stack}_layers"

    @property
    def is_tied(self) -> bool:
        """Whether the output matrix is the embedding: it always is."""
        return True

    def heads(self, stack: str) -> tuple[int, int]:
        """Return the number of heads of a stack, and their width."""
        encoder, decoder = self.encoder_attention_heads, self.decoder_attention_heads
        count = encoder if stack == "encoder" else decoder
        return count, self.d_model // count

    def width(self, stack: str) -> int:
        """Return the width of a stack's feed-forward blocks."""
        return self.encoder_ffn_dim if stack == "encoder" else self.decoder_ffn_dim

    def small_sizes(self) -> JsonDict:
        """Return the fields that are other in a small model of the same structure."""
        encoder, decoder = (shrink_size(self.heads(s)[0], SMALL_HEADS) for s in STACKS)
        width = shrink_size(self.heads("encoder")[1], SMALL_HEAD_DIM)
        return {
            **self.small_vocabulary(),
            "d_model": lcm(encoder, decoder) * width,
            "encoder_attention_heads": encoder,
            "decoder_attention_heads": decoder,
            "encoder_ffn_dim": shrink_size(self.encoder_ffn_dim, SMALL_MLP),
            "decoder_ffn_dim": shrink_size(self.decoder_ffn_dim, SMALL_MLP),
        }

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        yield from self.head_checks("d_model", "encoder_attention_heads")
        yield from self.head_checks("d_model", "decoder_attention_heads")


@config_class
class WhisperConfig(TwoStackConfig):
    """A whisper; `max_source_positions` is half the frames of its input, of which it takes all.

    With `encoder_alone` it is the encoder, below a head that classifies audio.
    """

    graphs = "whisper"
    model_type = "whisper"
    architecture = "WhisperForConditionalGeneration"
    aliases = (AUDIO_CLASSIFICATION,)
    base_prefix = "model."
    head_steps = {"AudioClassification": ("linear projector", "mean", CLASSIFIER)}
    kind = "an encoder of speech with a decoder"
    kept_numbers = ("init_std", "activation_dropout", "attention_dropout", "dropout")
    only = {
        **CAUSAL,
        "scale_embedding": (False, TIE),
        "tie_word_embeddings": (True, TIE),
        "is_encoder_decoder": (True, "a whisper without one of its halves is not supported"),
        "use_weighted_layer_sum": (False, "a head that reads all layers is not supported"),
    }
    always = {"is_encoder_decoder": True, "scale_embedding": False, "tie_word_embeddings": True}
    names = TensorNames(embedding="model.decoder.embed_tokens.weight", head="proj_out.weight")
    defaults = {
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
        "use_weighted_layer_sum": False,
        "init_std": 0.02,
        "dropout": 0.0,
        "activation_dropout": 0.0,
        "pad_token_id": 50_256,
        "bos_token_id": 50_256,
        "eos_token_id": 50_256,
    }

    num_mel_bins: int = size(COUNT)
    max_source_positions: int = size(NEURONS, default=1500)
    max_target_positions: int = size(LENGTH, default=448)
    encoder_alone: bool = False

    def small_sizes(self) -> JsonDict:
        """Return the fields that are other in a small model of the same structure."""
        return {
            **super().small_sizes(),
            "num_mel_bins": shrink_size(self.num_mel_bins, SMALL_HEAD_DIM),
            "max_source_positions": shrink_size(self.max_source_positions, SMALL_HEAD_DIM),
            "max_target_positions": shrink_size(self.max_target_positions, SMALL_VOCAB),
        }

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        alone = AUDIO_CLASSIFICATION in reader.items("architectures")
        return {**super()._read(reader), "encoder_alone": alone}

    def to_json(self) -> dict[str, object]:
        """Return config.json; the class of the encoder alone is that of its head."""
        name = AUDIO_CLASSIFICATION if self.encoder_alone else self.architecture
        return {**super().to_json(), "architectures": [name]}

    @property
    def first_tensor(self) -> str:
        """A tensor that every checkpoint of the family has."""
        return "model.encoder.conv1.weight"
