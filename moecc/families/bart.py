"""bart, mbart, marian and m2m_100 (NLLB): two stacks of text with layer norms."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from typing import ClassVar, Self

from moecc.families.config import (
    CAUSAL,
    PaddedPositionsConfig,
    TensorNames,
    config_class,
    flag,
    size,
)
from moecc.families.reader import EXTRA_DEFAULTS, LENGTH, KeyProblem, Reader, key_problem
from moecc.families.shrinking import SMALL_VOCAB, shrink_size
from moecc.families.whisper import TwoStackConfig
from moecc.support.untyped import JsonDict

TIED = "only an output matrix that is the table of tokens is supported"


@config_class
class BartConfig(TwoStackConfig):
    """A bart: learned positions from the third row of their table on, and norms after the sums.

    `has_logits_bias` says whether a vector of the file is added to the logits; a file of the base
    model alone lacks it, and its config does not say so.
    """

    graphs = "bart"
    model_type = "bart"
    architecture = "BartForConditionalGeneration"
    aliases: ClassVar[tuple[str, ...]] = ("BartModel",)
    base_prefix = "model."
    kind = "an encoder-decoder"
    takes_mask = True
    kept_numbers = (
        *("init_std", "activation_dropout", "attention_dropout", "dropout"),
        *("encoder_layerdrop", "decoder_layerdrop"),
    )
    only = {
        **CAUSAL,
        "tie_word_embeddings": (True, TIED),
        "is_encoder_decoder": (True, "a model without one of its stacks is not supported"),
        "is_decoder": (False, "a decoder alone is not supported"),
    }
    # Of heads.
    idle: ClassVar[tuple[str, ...]] = ("classifier_dropout", "classif_dropout")
    always = {"is_encoder_decoder": True, "tie_word_embeddings": True}
    names = TensorNames(
        embedding="model.shared.weight",
        copies=("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"),
    )
    defaults: ClassVar[Mapping[str, object]] = {
        **EXTRA_DEFAULTS,
        "vocab_size": 50_265,
        "d_model": 1024,
        **{f"{stack}_layers": 12 for stack in ("encoder", "decoder")},
        **{f"{stack}_attention_heads": 16 for stack in ("encoder", "decoder")},
        **{f"{stack}_ffn_dim": 4096 for stack in ("encoder", "decoder")},
        **{f"{stack}_layerdrop": 0.0 for stack in ("encoder", "decoder")},
        "max_position_embeddings": 1024,
        "activation_function": "gelu",
        "scale_embedding": False,
        "tie_word_embeddings": True,
        "is_encoder_decoder": True,
        "is_decoder": False,
        "init_std": 0.02,
        "dropout": 0.1,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    # How positions are computed: looked up in a table, or by sines; see `moecc.families.graphs`.
    positions: ClassVar[str] = "learned"
    norms_first: ClassVar[bool] = False
    # The norm of the embeddings, and that behind all layers; empty if there is none.
    around: ClassVar[tuple[str, str]] = ("layernorm_embedding", "")
    # Whether files hold a vector that is added to the logits.
    adds_to_logits: ClassVar[bool] = True

    max_position_embeddings: int = size(LENGTH, default=1024)
    scale_embedding: bool = flag(default=False)
    has_logits_bias: bool = False

    def fitted(self, tensors: Container[str]) -> Self:
        """Return the config of a file with `tensors`, which say whether logits have a bias."""
        if not self.adds_to_logits:
            return self
        return replace(self, has_logits_bias="final_logits_bias" in tensors)

    def small_sizes(self) -> JsonDict:
        """Return the fields that are other in a small model of the same structure."""
        longest = shrink_size(self.max_position_embeddings, SMALL_VOCAB)
        return {**super().small_sizes(), "max_position_embeddings": longest}

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        return {**super()._read(reader), "has_logits_bias": cls.adds_to_logits}

    @property
    def first_tensor(self) -> str:
        """A tensor that every checkpoint of the family has."""
        return self.names.embedding


@config_class
class MBartConfig(BartConfig):
    """An mbart: a bart of many languages, whose layers normalise first."""

    model_type = "mbart"
    architecture = "MBartForConditionalGeneration"
    aliases = ("MBartModel",)
    norms_first = True
    around = ("layernorm_embedding", "layer_norm")


@config_class
class MarianConfig(BartConfig):
    """A marian, of OPUS-MT: positions by sines, and norms after the sums."""

    model_type = "marian"
    architecture = "MarianMTModel"
    aliases = ("MarianModel",)
    only = {
        "share_encoder_decoder_embeddings": (True, "a table for each stack is not supported"),
    }
    defaults = {
        **BartConfig.defaults,
        "vocab_size": 58_101,
        "decoder_vocab_size": None,
        "share_encoder_decoder_embeddings": True,
        "decoder_start_token_id": 58_100,
        "pad_token_id": 58_100,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    positions = "sines"
    around = ("", "")

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        values = super()._read(reader)
        if reader.value("decoder_vocab_size") not in (None, values["vocab_size"]):
            fault = "vocabularies of the stacks that differ are not supported"
            reader.refuse("decoder_vocab_size", fault, expected=f"{values['vocab_size']}")
        return values

    def _write(self) -> JsonDict:
        return {**super()._write(), "decoder_vocab_size": self.vocab_size}


@config_class
class M2M100Config(PaddedPositionsConfig, BartConfig):
    """An m2m_100, or an NLLB that is dense: sines of positions that count from the padding's."""

    model_type = "m2m_100"
    architecture = "M2M100ForConditionalGeneration"
    aliases = ("M2M100Model",)
    defaults = {
        **BartConfig.defaults,
        "vocab_size": 128_112,
        "encoder_layerdrop": 0.05,
        "decoder_layerdrop": 0.05,
        "activation_function": "relu",
        "attention_dropout": 0.1,
        "scale_embedding": True,
    }
    positions = "sines of fairseq"
    norms_first = True
    around = ("", "layer_norm")
    adds_to_logits = False

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if self.d_model < 4 or self.d_model % 2:
            fault = "half of the width are sines"
            yield key_problem(fault, "an even number of at least 4", f"{self.d_model}", "d_model")
