"""bert, roberta and its namesakes, mpnet, distilbert: encoders with norms after the sums."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from moecc.families.config import ModelConfig, activation_problem, config_class
from moecc.families.encdec import read_activation
from moecc.families.reader import EXTRA_DEFAULTS, LARGEST_SIZES, KeyProblem, Reader, key_problem

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)

BERT_DEFAULTS: Mapping[str, object] = {
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


@config_class
class BertConfig(ModelConfig):
    """A bert without a head: its output is the hidden states of the last layer.

    `type_vocab_size` is 0 without token types; the first `position_offset` rows of the table of
    positions belong to no token.
    """

    model_type: ClassVar[str] = "bert"
    architecture: ClassVar[str] = "BertModel"
    with_heads: ClassVar[bool] = True
    takes_mask: ClassVar[bool] = True
    head_prefix: ClassVar[str] = "bert."
    has_pooler: ClassVar[bool] = True
    kept_numbers: ClassVar[tuple[str, ...]] = (
        "initializer_range",
        "attention_probs_dropout_prob",
        "hidden_dropout_prob",
    )
    defaults: ClassVar[Mapping[str, object]] = BERT_DEFAULTS
    has_types: ClassVar[bool] = True

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    position_offset: int = 0

    @classmethod
    def shape(cls) -> type[ModelConfig]:
        """Return the class whose fields all families of this shape of model share."""
        return cls

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def relative_buckets(self) -> int:
        """The buckets of a table of biases by distance, 0 without one."""
        return 0

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        for name in (*SIZES, *(["type_vocab_size"] if self.has_types else [])):
            value = getattr(self, name)
            if not 1 <= value <= LARGEST_SIZES[name]:
                expected = f"1 to {LARGEST_SIZES[name]:,}"
                yield key_problem("not a usable size", expected, f"{value}", self.key(name))
        if self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            what = "the heads do not divide the width"
            expected = f"a multiple of {self.num_attention_heads}"
            keys = (self.key("hidden_size"), self.key("num_attention_heads"))
            yield key_problem(what, expected, f"{self.hidden_size}", *keys)
        if not 0 <= self.position_offset < self.max_position_embeddings:
            what = "the table of positions has none for a token"
            expected = f"more than {self.position_offset}"
            keys = ("max_position_embeddings", "pad_token_id")
            yield key_problem(what, expected, f"{self.max_position_embeddings}", *keys)
        yield from activation_problem(self.hidden_act, self.key("hidden_act"))
        yield from super().checks()

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, object]:
        for key in ("is_decoder", "add_cross_attention"):
            if reader.flag(key):
                what = f"a {cls.model_type} that decodes is not supported"
                reader.refuse(key, what, expected="false")
        if reader.value("position_embedding_type") != "absolute":
            what = "only learned absolute positions are supported"
            reader.refuse("position_embedding_type", what, expected="absolute")
        for key in ("classifier_dropout", "gradient_checkpointing"):
            reader.value(key)
        types = {"type_vocab_size": reader.size("type_vocab_size")} if cls.has_types else {}
        return {
            **super()._read(reader),
            **{name: reader.size(cls.key(name)) for name in SIZES},
            **types,
            "layer_norm_eps": reader.number("layer_norm_eps", least=0),
            "hidden_act": read_activation(reader, cls.key("hidden_act")),
        }

    def _write(self) -> dict[str, object]:
        keys: dict[str, object] = {
            **{self.key(name): getattr(self, name) for name in SIZES},
            "layer_norm_eps": self.layer_norm_eps,
            self.key("hidden_act"): self.hidden_act,
            "position_embedding_type": "absolute",
        }
        return {**keys, "type_vocab_size": self.type_vocab_size} if self.has_types else keys


@config_class
class RobertaConfig(BertConfig):
    """A roberta: positions count from behind that of the padding token."""

    model_type: ClassVar[str] = "roberta"
    architecture: ClassVar[str] = "RobertaModel"
    head_prefix: ClassVar[str] = "roberta."
    defaults: ClassVar[Mapping[str, object]] = {
        **BERT_DEFAULTS,
        "vocab_size": 50_265,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }

    position_offset: int = 2

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, object]:
        padding = reader.value("pad_token_id")
        if type(padding) is not int or padding < 0:
            what = "positions count from the id of the padding token"
            reader.refuse("pad_token_id", what, expected="a token id")
            padding = 1
        return {**super()._read(reader), "position_offset": padding + 1}

    def _write(self) -> dict[str, object]:
        return {**super()._write(), "pad_token_id": self.position_offset - 1}


@config_class
class XlmRobertaConfig(RobertaConfig):
    """An xlm-roberta: a roberta of many languages, under another name."""

    model_type: ClassVar[str] = "xlm-roberta"
    architecture: ClassVar[str] = "XLMRobertaModel"
    defaults: ClassVar[Mapping[str, object]] = {**RobertaConfig.defaults, "vocab_size": 30_522}


@config_class
class CamembertConfig(RobertaConfig):
    """A camembert: a roberta of French, under another name."""

    model_type: ClassVar[str] = "camembert"
    architecture: ClassVar[str] = "CamembertModel"
    defaults: ClassVar[Mapping[str, object]] = {**RobertaConfig.defaults, "vocab_size": 30_522}


@config_class
class MPNetConfig(BertConfig):
    """An mpnet: biases of the scores by distance, the same in all layers, and no token types."""

    model_type: ClassVar[str] = "mpnet"
    architecture: ClassVar[str] = "MPNetModel"
    head_prefix: ClassVar[str] = "mpnet."
    has_types: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, object]] = {
        **BERT_DEFAULTS,
        "vocab_size": 30_527,
        "relative_attention_num_buckets": 32,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }

    type_vocab_size: int = 0
    position_offset: int = 2

    @property
    def relative_buckets(self) -> int:
        """The buckets of a table of biases by distance; transformers takes no other number."""
        return 32

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, object]:
        if reader.value("relative_attention_num_buckets") != 32:
            what = "transformers computes with 32 buckets whatever the config says"
            reader.refuse("relative_attention_num_buckets", what, expected="32")
        return super()._read(reader)

    def _write(self) -> dict[str, object]:
        return {**super()._write(), "relative_attention_num_buckets": self.relative_buckets}


@config_class
class DistilBertConfig(BertConfig):
    """A distilbert: a bert without token types and pooler, whose keys have names of their own."""

    model_type: ClassVar[str] = "distilbert"
    architecture: ClassVar[str] = "DistilBertModel"
    head_prefix: ClassVar[str] = "distilbert."
    has_pooler: ClassVar[bool] = False
    has_types: ClassVar[bool] = False
    kept_numbers: ClassVar[tuple[str, ...]] = ("initializer_range", "attention_dropout", "dropout")
    keys: ClassVar[Mapping[str, str]] = {
        "hidden_size": "dim",
        "intermediate_size": "hidden_dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "hidden_act": "activation",
    }
    synonyms: ClassVar[Mapping[str, str]] = {
        "hidden_size": "dim",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    }
    defaults: ClassVar[Mapping[str, object]] = {
        **BERT_DEFAULTS,
        "dim": 768,
        "hidden_dim": 3072,
        "n_layers": 6,
        "n_heads": 12,
        "activation": "gelu",
        "attention_dropout": 0.1,
        "dropout": 0.1,
    }

    type_vocab_size: int = 0

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, object]:
        # The table is stored, whatever it was made from, and heads are no part of the graph.
        for key in ("sinusoidal_pos_embds", "qa_dropout", "seq_classif_dropout", "tie_weights_"):
            reader.value(key)
        if reader.value("layer_norm_eps") != BERT_DEFAULTS["layer_norm_eps"]:
            what = "transformers computes with 1e-12 whatever the config says"
            reader.refuse("layer_norm_eps", what, expected="1e-12")
        return super()._read(reader)

    def _write(self) -> dict[str, object]:
        written = super()._write()
        return {k: v for k, v in written.items() if k != "layer_norm_eps"}
