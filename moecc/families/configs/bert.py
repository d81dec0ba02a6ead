"""bert: an encoder with learned positions, norms after the sums, and biases everywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from .encdec import read_activation
from .extras import EXTRA_DEFAULTS
from .model import ModelConfig, activation_problem
from .reader import LARGEST_SIZES, KeyProblem, Reader, key_problem

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "type_vocab_size",
)


@dataclass(frozen=True, kw_only=True)
class BertConfig(ModelConfig):
    """A bert without a head: its output is the hidden states of the last layer."""

    model_type: ClassVar[str] = "bert"
    architecture: ClassVar[str] = "BertModel"
    kept_numbers: ClassVar[tuple[str, ...]] = (
        "initializer_range",
        "attention_probs_dropout_prob",
        "hidden_dropout_prob",
    )
    defaults: ClassVar[Mapping[str, object]] = {
        **EXTRA_DEFAULTS,
        "vocab_size": 30_522,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "attention_probs_dropout_prob": 0.1,
        "hidden_dropout_prob": 0.1,
        "pad_token_id": 0,
    }

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"

    @classmethod
    def shape(cls) -> type[ModelConfig]:
        """Return the class whose fields all families of this shape of model share."""
        return BertConfig

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return self.hidden_size // self.num_attention_heads

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        for name in SIZES:
            value = getattr(self, name)
            if not 1 <= value <= LARGEST_SIZES[name]:
                expected = f"1 to {LARGEST_SIZES[name]:,}"
                yield key_problem("not a usable size", expected, f"{value}", name)
        if self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            what = "the heads do not divide the width"
            expected = f"a multiple of {self.num_attention_heads}"
            keys = ("hidden_size", "num_attention_heads")
            yield key_problem(what, expected, f"{self.hidden_size}", *keys)
        yield from activation_problem(self.hidden_act)
        yield from super().checks()

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, object]:
        for key in ("is_decoder", "add_cross_attention"):
            if reader.flag(key):
                reader.refuse(key, "a bert that decodes is not supported", expected="false")
        if reader.value("position_embedding_type") != "absolute":
            what = "only learned absolute positions are supported"
            reader.refuse("position_embedding_type", what, expected="absolute")
        for key in ("classifier_dropout", "gradient_checkpointing"):
            reader.value(key)
        return {
            **super()._read(reader),
            **{name: reader.size(name) for name in SIZES},
            "layer_norm_eps": reader.number("layer_norm_eps", least=0),
            "hidden_act": read_activation(reader, "hidden_act"),
        }

    def _write(self) -> dict[str, object]:
        return {
            **{name: getattr(self, name) for name in SIZES},
            "layer_norm_eps": self.layer_norm_eps,
            "hidden_act": self.hidden_act,
            "position_embedding_type": "absolute",
        }
