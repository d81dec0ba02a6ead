"""t5: version 1.0 (ReLU, tied) and 1.1 (gated GELU, an output matrix of its own), mt5 and umt5."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from moecc.families.config import ACTIVATIONS, config_class
from moecc.families.encdec import ENCDEC_DEFAULTS, T5_ACTIVATIONS, EncDecConfig, read_activation
from moecc.families.reader import KeyProblem, Reader, key_problem, one_of

GATED = "gated-"


@config_class
class T5Config(EncDecConfig):
    """A t5.

    transformers infers version 1.1 from ``tie_word_embeddings: false``; its outputs are
    not scaled.  Version 5 then writes ``scale_decoder_outputs`` for it, and true for the tie
    whether or not there is an output matrix, so an importer looks for that tensor.
    """

    model_type: ClassVar[str] = "t5"
    architecture: ClassVar[str] = "T5ForConditionalGeneration"
    aliases: ClassVar[tuple[str, ...]] = ("T5WithLMHeadModel",)
    synonyms: ClassVar[Mapping[str, str]] = {**EncDecConfig.synonyms, "head_dim": "d_kv"}
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
            what = f"{family} scales its outputs only where the output matrix is the embedding"
            keys = ("scale_decoder_outputs", "tie_word_embeddings")
            yield key_problem(what, "false", "true", *keys)
        if self.gated and self.hidden_act == "gelu":
            what = f"{self.model_type} gates with the tanh approximation of GELU"
            stating = ("feed_forward_proj", "dense_act_fn", "is_gated_act")
            yield key_problem(what, "gelu_pytorch_tanh", "gelu", *stating)

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, object]:
        values = super()._read(reader)
        act, gated = _read_projection(reader)
        # transformers derives these two from the projection, and takes those that are stated.
        if reader.has("dense_act_fn"):
            act = read_activation(reader, "dense_act_fn")
        if reader.has("is_gated_act"):
            gated = reader.flag("is_gated_act")
        reader.value("is_decoder")
        stated = reader.value("scale_decoder_outputs") is not None
        tied = values["tie_word_embeddings"]
        scaled = reader.flag("scale_decoder_outputs") if stated else tied
        return {**values, "hidden_act": act, "gated": gated, "scale_outputs": scaled}

    def _write(self) -> dict[str, object]:
        return {
            **super()._write(),
            "feed_forward_proj": self._projection,
            "scale_decoder_outputs": self.scale_outputs,
        }

    @property
    def _projection(self) -> str:
        if not self.gated:
            return T5_ACTIVATIONS[self.hidden_act]
        return f"{GATED}{T5_ACTIVATIONS[self.hidden_act].replace('gelu_new', 'gelu')}"


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

    model_type: ClassVar[str] = "mt5"
    architecture: ClassVar[str] = "MT5ForConditionalGeneration"
    aliases: ClassVar[tuple[str, ...]] = ()
    defaults: ClassVar[Mapping[str, object]] = {**_MANY_LANGUAGES, "tie_word_embeddings": False}

    scale_outputs: bool = False

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if self.scale_outputs:
            yield key_problem("mt5 scales no outputs", "false", "true", "scale_decoder_outputs")

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, object]:
        stated = reader.value("scale_decoder_outputs") is not None
        scaled = stated and reader.flag("scale_decoder_outputs")
        return {**super()._read(reader), "scale_outputs": scaled}


@config_class
class UMT5Config(T5Config):
    """A umt5: a t5 of many languages, with biases by distance of its own in every layer."""

    model_type: ClassVar[str] = "umt5"
    architecture: ClassVar[str] = "UMT5ForConditionalGeneration"
    aliases: ClassVar[tuple[str, ...]] = ()
    defaults: ClassVar[Mapping[str, object]] = _MANY_LANGUAGES
    biases_of_layers: ClassVar[bool] = True

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, object]:
        reader.value("scalable_attention")  # of the training code; transformers does not read it
        return super()._read(reader)


def _read_projection(reader: Reader) -> tuple[str, bool]:
    """Return the activation that ``feed_forward_proj`` names, and whether it gates."""
    stated = reader.value("feed_forward_proj")
    name = stated.removeprefix(GATED) if isinstance(stated, str) else ""
    gated = isinstance(stated, str) and stated.startswith(GATED)
    if name not in ACTIVATIONS:
        expected = f"{one_of(ACTIVATIONS)}, or gated- before it"
        reader.refuse("feed_forward_proj", "not supported", expected=expected)
        return "relu", False
    # In transformers gated-gelu is the tanh approximation, and plain gelu the error function.
    return ("gelu_pytorch_tanh" if gated and name == "gelu" else ACTIVATIONS[name]), gated
