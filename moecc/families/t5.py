"""t5: version 1.0 (ReLU, tied) and 1.1 (gated GELU, an output matrix of its own), mt5 and umt5."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from moecc.families.config import ACTIVATIONS, config_class, flag
from moecc.families.encdec import ENCDEC_DEFAULTS, T5_ACTIVATIONS, EncDecConfig
from moecc.families.reader import KeyProblem, Reader, key_problem, one_of
from moecc.support.untyped import JsonDict

GATED = "gated-"


@config_class
class T5Config(EncDecConfig):
    """A t5.

    transformers infers version 1.1 from ``tie_word_embeddings: false``; its outputs are
    not scaled.  Version 5 then writes ``scale_decoder_outputs`` for it, and true for the tie
    whether or not there is an output matrix, so an importer looks for that tensor.
    """

    model_type = "t5"
    architecture = "T5ForConditionalGeneration"
    aliases: ClassVar[tuple[str, ...]] = ("T5WithLMHeadModel",)
    keys = {"hidden_act": "", "gated": ""}
    synonyms = {**EncDecConfig.synonyms, "head_dim": "d_kv"}
    idle: ClassVar[tuple[str, ...]] = ("is_decoder",)
    defaults: ClassVar[Mapping[str, object]] = {
        **ENCDEC_DEFAULTS,
        "feed_forward_proj": "relu",
        "scale_decoder_outputs": None,
    }

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if self.scale_outputs and not self.tie_word_embeddings:
            family = self.model_type
            fault = f"{family} scales its outputs only where the output matrix is the embedding"
            keys = ("scale_decoder_outputs", "tie_word_embeddings")
            yield key_problem(fault, "false", "true", *keys)
        stating = ("feed_forward_proj", "dense_act_fn", "is_gated_act")
        if self.gated and self.hidden_act == "gelu":
            fault = f"{self.model_type} gates with the tanh approximation of GELU"
            yield key_problem(fault, "gelu_pytorch_tanh", "gelu", *stating)
        if self.hidden_act not in T5_ACTIVATIONS:
            fault = "unknown activation"
            yield key_problem(fault, one_of(T5_ACTIVATIONS), self.hidden_act, *stating)

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        values, stated = super()._read(reader), reader.value("feed_forward_proj")
        gated = isinstance(stated, str) and stated.startswith(GATED)
        name = stated.removeprefix(GATED) if isinstance(stated, str) else ""
        if name not in ACTIVATIONS:
            expected = f"{one_of(ACTIVATIONS)}, or gated- before it"
            reader.refuse("feed_forward_proj", "not supported", expected=expected)
            name, gated = "relu", False
        # In transformers gated-gelu is the tanh approximation, and plain gelu the error function.
        act = "gelu_pytorch_tanh" if gated and name == "gelu" else ACTIVATIONS[name]
        # transformers derives these two from the projection, and takes those that are stated.
        if reader.has("dense_act_fn"):
            act = ACTIVATIONS[reader.choice("dense_act_fn", ACTIVATIONS)]
        if reader.has("is_gated_act"):
            gated = reader.flag("is_gated_act")
        return {**values, "hidden_act": act, "gated": gated}

    def _write(self) -> JsonDict:
        act = T5_ACTIVATIONS[self.hidden_act]
        projection = f"{GATED}{act.replace('gelu_new', 'gelu')}" if self.gated else act
        return {**super()._write(), "feed_forward_proj": projection}


_MANY_LANGUAGES: Mapping[str, object] = {
    **T5Config.defaults,
    "vocab_size": 250_112,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
}


@config_class
class MT5Config(T5Config):
    """An mt5: a t5 of version 1.1, of many languages, whose outputs are never scaled.

    Version 4 scales those of a config that says that the matrices are tied, which no published
    checkpoint does; version 5 writes so for every model, and scales none.
    """

    model_type = "mt5"
    architecture = "MT5ForConditionalGeneration"
    aliases = ()
    defaults = {**_MANY_LANGUAGES, "tie_word_embeddings": False}

    scale_outputs: bool = flag(null=lambda values: False, default=False)

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if self.scale_outputs:
            yield key_problem("mt5 scales no outputs", "false", "true", "scale_decoder_outputs")


@config_class
class UMT5Config(T5Config):
    """A umt5: a t5 of many languages, with biases by distance of its own in every layer."""

    model_type = "umt5"
    architecture = "UMT5ForConditionalGeneration"
    aliases = ()
    # The second key is of the training code; transformers does not read it.
    idle = ("is_decoder", "scalable_attention")
    defaults = _MANY_LANGUAGES
    biases_of_layers = True
