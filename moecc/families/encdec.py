"""The base config of encoder-decoder families: T5's shape, dense or with experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moecc.families.config import (
    CAUSAL,
    ModelConfig,
    TensorNames,
    activation,
    config_class,
    flag,
    number,
    size,
)
from moecc.families.reader import (
    COUNT,
    EXTRA_DEFAULTS,
    LAYERS,
    NEURONS,
    WIDTH,
    KeyProblem,
    key_problem,
)
from moecc.families.shrinking import SMALL_EXPERT, SMALL_HEAD_DIM, SMALL_HEADS, shrink_size
from moecc.support.untyped import JsonDict

if TYPE_CHECKING:
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

    graphs = "encdec"
    stacks = STACKS
    kind = "an encoder-decoder"
    takes_mask = True
    synonyms = {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
    }
    defaults = ENCDEC_DEFAULTS
    keys = {
        "hidden_size": "d_model",
        "head_dim": "d_kv",
        "intermediate_size": "d_ff",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "rms_norm_eps": "layer_norm_epsilon",
        "hidden_act": "dense_act_fn",
        "gated": "is_gated_act",
        "scale_outputs": "scale_decoder_outputs",
    }
    only = {
        **CAUSAL,
        "is_encoder_decoder": (True, "an encoder-decoder without a decoder is not supported"),
        "tie_encoder_decoder": (False, "transformers 4 reads the decoder from the encoder"),
    }
    always = {"is_encoder_decoder": True}
    kept_numbers = ("dropout_rate", "initializer_factor")
    names = TensorNames(
        embedding="shared.weight",
        dense="DenseReluDense.",
        router="router.classifier.weight",
        expert="experts.expert_{expert}.",
        gate="wi_0",
        up="wi_1",
        single="wi",
        down="wo",
        copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    )
    # Whether every layer has its own biases by distance, not all those of the first.
    biases_of_layers: ClassVar[bool] = False

    hidden_size: int = size(WIDTH)
    head_dim: int = size(COUNT)
    intermediate_size: int = size(NEURONS)
    num_hidden_layers: int = size(LAYERS)
    num_decoder_layers: int = size(LAYERS, null=lambda values: values["num_hidden_layers"])
    num_attention_heads: int = size(COUNT)
    relative_attention_num_buckets: int = size(1 << 10, default=32)
    relative_attention_max_distance: int = size(COUNT, default=128)
    rms_norm_eps: float = number(least=0, default=1e-6)
    hidden_act: str = activation(default="relu")
    gated: bool = flag(default=False)
    tie_word_embeddings: bool = flag(default=True)
    scale_outputs: bool = flag(null=lambda values: values["tie_word_embeddings"], default=True)

    @classmethod
    def shape(cls) -> type[ModelConfig]:
        """Return the class whose fields all families of this shape of model share."""
        return EncDecConfig

    def layers(self, stack: str) -> int:
        """Return the number of layers of the ``encoder`` or the ``decoder``."""
        return self.num_hidden_layers if stack == "encoder" else self.num_decoder_layers

    def layers_key(self, stack: str) -> str:
        """Return the key of that number in config.json."""
        return self.key("num_decoder_layers" if stack == "decoder" else "num_hidden_layers")

    @property
    def experts(self) -> Experts | None:
        """The experts of the sparse layers; None in a dense family."""
        return None

    def sparse_layers(self, stack: str) -> tuple[bool, ...]:
        """Return for each layer of a stack whether it has experts."""
        return (False,) * self.layers(stack)

    def small_sizes(self) -> JsonDict:
        """Return the fields that are other in a small model of the same structure."""
        return {
            **self.small_vocabulary(),
            "hidden_size": shrink_size(self.hidden_size, SMALL_HEADS * SMALL_HEAD_DIM),
            "head_dim": shrink_size(self.head_dim, SMALL_HEAD_DIM),
            "num_attention_heads": shrink_size(self.num_attention_heads, SMALL_HEADS),
            "intermediate_size": shrink_size(self.intermediate_size, SMALL_EXPERT),
        }

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        buckets, furthest = "relative_attention_num_buckets", "relative_attention_max_distance"
        count, reach = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if count < 4 or count % 2:
            fault = "the encoder halves the buckets, and half of each half is exact"
            yield key_problem(fault, "an even number of at least 4", f"{count}", buckets)
        elif reach <= count // 2:
            fault = "the buckets of the decoder reach further than the largest distance"
            yield key_problem(fault, f"more than {count // 2}", f"{reach}", furthest, buckets)


T5_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_new", "relu": "relu", "silu": "silu"}
"""T5's names of activations, by moecc's name."""
