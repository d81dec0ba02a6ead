"""deberta-v2, and DeBERTa-v3: scores between contents, and between contents and distances."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from moecc.families.bert import BERT_DEFAULTS, BertConfig
from moecc.families.config import choice, config_class, flag, size
from moecc.families.heads import CLASSIFIER
from moecc.families.reader import COUNT, LENGTH, KeyProblem, Reader, key_problem
from moecc.support.untyped import JsonDict

C2P, P2C = "c2p", "p2c"
"""Terms of the scores: of a query and the distance, and of a key and the distance."""


@config_class
class DebertaV2Config(BertConfig):
    """A deberta-v2; queries and keys meet rows of a table of distances, too.

    `position_buckets` is the number of buckets of the distances in one direction, 0 where each has
    its own, up to `max_relative_positions`.
    """

    model_type = "deberta-v2"
    architecture = "DebertaV2Model"
    head_prefix = "deberta."
    keys = {"relative_norm": "", "terms": "", "position_buckets": "", "max_relative_positions": ""}
    only = {
        "conv_kernel_size": (0, "a convolution is not supported here, but by --via torch"),
        "tie_word_embeddings": (True, "only a head that is the table of tokens is supported"),
    }
    # Of training, and of a layer that transformers never runs again.
    idle = (*BertConfig.idle, "pooler_dropout", "cls_dropout", "z_steps")
    names = replace(
        BertConfig.names,
        query="attention.self.query_proj",
        key="attention.self.key_proj",
        value="attention.self.value_proj",
    )
    gguf = None
    defaults = {
        **BERT_DEFAULTS,
        "vocab_size": 128_100,
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_attention_heads": 24,
        "type_vocab_size": 0,
        "layer_norm_eps": 1e-7,
        "relative_attention": False,
        "share_att_key": False,
        "max_relative_positions": -1,
        "position_buckets": -1,
        "position_biased_input": True,
        "pos_att_type": None,
        "norm_rel_ebd": "none",
        "pooler_hidden_act": "gelu",
        "legacy": True,
        "conv_kernel_size": 0,
        "tie_word_embeddings": True,
    }

    type_vocab_size: int = size(COUNT, least=0, default=0)
    relative_attention: bool = flag(default=False)
    share_att_key: bool = flag(default=False)
    position_biased_input: bool = flag(default=True)
    terms: tuple[str, ...] = ()
    relative_norm: bool = False
    position_buckets: int = 0
    max_relative_positions: int = 512
    # Of heads.
    pooler_hidden_act: str = choice(("gelu", "relu", "tanh"), default="gelu")
    legacy: bool = flag(default=True)

    @property
    def has_positions(self) -> bool:
        """Whether there is a table of absolute positions."""
        return self.position_biased_input

    @property
    def has_types(self) -> bool:
        """Whether there is a table of token types."""
        return self.type_vocab_size > 0

    @property
    def distances(self) -> tuple[int, int]:
        """The rows of the table of distances, and `max_distance` of their buckets."""
        if self.position_buckets:
            return 2 * self.position_buckets, self.max_relative_positions
        return 2 * self.max_relative_positions, 0

    @property
    def score_scale(self) -> float:
        """The factor on each term of the scores."""
        return float((self.head_dim * (1 + len(self.terms))) ** -0.5)

    def small_sizes(self) -> JsonDict:
        """Return the fields that are other in a small model of the same structure."""
        return {
            **super().small_sizes(),
            "position_buckets": min(self.position_buckets, 4),
            "max_relative_positions": min(self.max_relative_positions, 8),
        }

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if self.relative_attention and not self.terms:
            fault = "relative attention has a term of the scores"
            yield key_problem(fault, "c2p, p2c or both", "none", "pos_att_type")
        if self.relative_norm and not self.relative_attention:
            fault = "there are no relative positions to normalise"
            yield key_problem(fault, "none", "layer_norm", "norm_rel_ebd", "relative_attention")
        buckets, longest = self.position_buckets, self.max_relative_positions
        if buckets and not (buckets >= 4 and buckets // 2 + 1 < longest):
            fault = "no such buckets of distances"
            expected = "at least 4, and half of them fewer than max_relative_positions"
            keys = ("position_buckets", "max_relative_positions", "max_position_embeddings")
            yield key_problem(fault, expected, f"{buckets} up to {longest}", *keys)

    def stated_heads(self) -> Mapping[str, tuple[str, ...]]:
        """Return the heads that files may hold, by their tasks."""
        dense, norm, words, bias = (
            f"cls.predictions.{name}"
            if self.legacy
            else f"lm_predictions.lm_head.{name.removeprefix('transform.')}"
            for name in ("transform.dense", "transform.LayerNorm", "decoder", "bias")
        )
        pooled = ("first", "linear pooler.dense", self.pooler_hidden_act)
        masked = (f"linear {dense}", "activation", f"norm {norm}", f"tokens {words} {bias}")
        return {
            "MaskedLM": masked,
            "SequenceClassification": (*pooled, CLASSIFIER),
            "TokenClassification": (CLASSIFIER,),
        }

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        values = super()._read(reader)
        width = values["hidden_size"]
        shares = {
            "embedding_size": width,
            "pooler_hidden_size": width,
            "attention_head_size": width // values["num_attention_heads"],
        }
        for key, usual in shares.items():
            if reader.has(key) and reader.data[key] != usual:
                reader.refuse(key, "only the usual size is supported", expected=f"{usual}")
        sizes = {}
        for key in ("position_buckets", "max_relative_positions"):
            value = reader.value(key)
            is_negative = type(value) is int and value < 1
            sizes[key] = 0 if is_negative else reader.size(key, LENGTH)
        longest = sizes["max_relative_positions"] or values["max_position_embeddings"]
        norms = reader.value("norm_rel_ebd")
        if not isinstance(norms, str):
            reader.refuse("norm_rel_ebd", "not a text", expected="none or layer_norm")
            norms = "none"
        return {
            **values,
            **sizes,
            "max_relative_positions": longest,
            "terms": cls._read_terms(reader),
            "relative_norm": "layer_norm" in [word.strip() for word in norms.lower().split("|")],
        }

    @classmethod
    def _read_terms(cls, reader: Reader) -> tuple[str, ...]:
        stated = reader.value("pos_att_type")
        if isinstance(stated, str):
            words: tuple[object, ...] = tuple(word.strip() for word in stated.lower().split("|"))
        else:
            words = reader.items("pos_att_type")
        return tuple(term for term in (C2P, P2C) if term in words)

    def _write(self) -> JsonDict:
        return {
            **super()._write(),
            "position_buckets": self.position_buckets or -1,
            "max_relative_positions": self.max_relative_positions,
            "pos_att_type": list(self.terms) or None,
            "norm_rel_ebd": "layer_norm" if self.relative_norm else "none",
        }
