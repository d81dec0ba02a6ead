"""The base config of encoder-decoder families: T5's shape, dense or with experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from moecc.families.config import ACTIVATIONS, ModelConfig, activation_problem, config_class
from moecc.families.reader import (
    EXTRA_DEFAULTS,
    LARGEST_SIZES,
    KeyProblem,
    Reader,
    key_problem,
    refuse_attention_to_later_tokens,
)
from moecc.ir.conventions import Gates

STACKS = ("encoder", "decoder")

ENCDEC_DEFAULTS: Mapping[str, object] = {
    **EXTRA_DEFAULTS,
    "vocab_size": 32_128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_decoder_layers": None,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "initializer_factor": 1.0,
    "tie_word_embeddings": True,
    "is_encoder_decoder": True,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

KEYS: Mapping[str, str] = {
    "hidden_size": "d_model",
    "head_dim": "d_kv",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers",
    "num_decoder_layers": "num_decoder_layers",
    "num_attention_heads": "num_heads",
    "relative_attention_num_buckets": "relative_attention_num_buckets",
    "relative_attention_max_distance": "relative_attention_max_distance",
}
"""Fields that are sizes, and their names in T5's config.json."""


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of the sparse layers, the same in each.

    Attributes:
      count: the number of experts.
      top_k: experts per token.
      gates: the gate convention, as in ``route``.
      sequence_capacity: the most tokens of one sequence that an expert takes; others are dropped;
        0 for no bound.
      capacity_factor: the slots of an expert over tokens per expert, 0 for no bound.
      extra_ffn: whether there is a dense feed-forward sublayer before or after a sparse one
        (ST-MoE, Appendix C): ``none``, ``before`` or ``after``.
    """

    count: int
    top_k: int = 1
    gates: Gates = "softmax"
    sequence_capacity: int = 0
    capacity_factor: float = 0.0
    extra_ffn: str = "none"


@config_class
class EncDecConfig(ModelConfig):
    """An encoder-decoder of T5's shape: relative positions, RMS norms, no biases.

    `num_hidden_layers` counts the encoder's layers, `intermediate_size` is the width of every
    feed-forward block, and `scale_outputs` says whether the decoder's output is multiplied by
    ``hidden_size ** -0.5`` before the logits.
    """

    kind: ClassVar[str] = "an encoder-decoder"
    takes_mask: ClassVar[bool] = True
    synonyms: ClassVar[Mapping[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
    }
    defaults: ClassVar[Mapping[str, object]] = ENCDEC_DEFAULTS
    # Whether every layer has its own biases by distance, not all those of the first.
    biases_of_layers: ClassVar[bool] = False
    kept_numbers: ClassVar[tuple[str, ...]] = ("dropout_rate", "initializer_factor")

    hidden_size: int
    head_dim: int
    intermediate_size: int
    num_hidden_layers: int
    num_decoder_layers: int
    num_attention_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    rms_norm_eps: float = 1e-6
    hidden_act: str = "relu"
    gated: bool = False
    tie_word_embeddings: bool = True
    scale_outputs: bool = True

    @classmethod
    def shape(cls) -> type[ModelConfig]:
        """Return the class whose fields all families of this shape of model share."""
        return EncDecConfig

    def layers(self, stack: str) -> int:
        """Return the number of layers of the ``encoder`` or the ``decoder``."""
        return self.num_hidden_layers if stack == "encoder" else self.num_decoder_layers

    @property
    def experts(self) -> Experts | None:
        """The experts of the sparse layers; None in a dense family."""
        return None

    def sparse_layers(self, stack: str) -> tuple[bool, ...]:
        """Return for each layer of a stack whether it has experts."""
        return (False,) * self.layers(stack)

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        for name, key in KEYS.items():
            value = getattr(self, name)
            if not 1 <= value <= LARGEST_SIZES[key]:
                yield key_problem(
                    "not a usable size", f"1 to {LARGEST_SIZES[key]:,}", f"{value}", key
                )
        yield from self._bucket_checks()
        yield from activation_problem(self.hidden_act)
        yield from super().checks()

    def _bucket_checks(self) -> Iterator[KeyProblem]:
        buckets, furthest = "relative_attention_num_buckets", "relative_attention_max_distance"
        count, reach = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if count < 4 or count % 2:
            what = "the encoder halves the buckets, and half of each half is exact"
            yield key_problem(what, "an even number of at least 4", f"{count}", buckets)
        elif reach <= count // 2:
            what = "the buckets of the decoder reach further than the largest distance"
            yield key_problem(what, f"more than {count // 2}", f"{reach}", furthest, buckets)

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, object]:
        refuse_attention_to_later_tokens(reader)
        sizes = {name: reader.size(key) for name, key in KEYS.items() if key != DECODER_LAYERS}
        if not reader.flag("is_encoder_decoder"):
            reader.refuse("is_encoder_decoder", f"a {cls.model_type} without a decoder")
        return {
            **super()._read(reader),
            **sizes,
            # Without the key both stacks are equally deep.
            DECODER_LAYERS: reader.optional_size(DECODER_LAYERS) or sizes["num_hidden_layers"],
            "rms_norm_eps": reader.number("layer_norm_epsilon", least=0),
            "tie_word_embeddings": reader.flag("tie_word_embeddings"),
        }

    def _write(self) -> dict[str, object]:
        return {
            **{key: getattr(self, name) for name, key in KEYS.items()},
            "layer_norm_epsilon": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_word_embeddings,
            "is_encoder_decoder": True,
        }


DECODER_LAYERS = "num_decoder_layers"

T5_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_new", "relu": "relu", "silu": "silu"}
"""T5's names of activations, by moecc's name."""


def read_activation(reader: Reader, key: str) -> str:
    """Return the activation at `key`, by moecc's name."""
    return ACTIVATIONS[reader.choice(key, ACTIVATIONS)]
