"""t5: version 1.0 (ReLU, tied embeddings) and 1.1 (gated GELU, an output matrix of its own)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from .encdec import ENCDEC_DEFAULTS, T5_ACTIVATIONS, EncDecConfig
from .model import ACTIVATIONS
from .reader import KeyProblem, Reader, key_problem, one_of

GATED = "gated-"


@dataclass(frozen=True, kw_only=True)
class T5Config(EncDecConfig):
    """A t5.

    transformers infers version 1.1 from ``tie_word_embeddings: false``; its outputs are
    not scaled.  Version 5 then writes ``scale_decoder_outputs`` for it, and true for the tie
    whether or not there is an output matrix, so an importer looks for that tensor.
    """

    model_type: ClassVar[str] = "t5"
    architecture: ClassVar[str] = "T5ForConditionalGeneration"
    aliases: ClassVar[tuple[str, ...]] = ("T5WithLMHeadModel",)
    defaults: ClassVar[Mapping[str, object]] = {
        **ENCDEC_DEFAULTS,
        "feed_forward_proj": "relu",
        "scale_decoder_outputs": None,
    }

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if self.scale_outputs and not self.tie_word_embeddings:
            what = "t5 scales its outputs only where the output matrix is the embedding"
            keys = ("scale_decoder_outputs", "tie_word_embeddings")
            yield key_problem(what, "false", "true", *keys)
        if self.gated and self.hidden_act == "gelu":
            what = "t5 gates with the tanh approximation of GELU"
            yield key_problem(what, "gelu_pytorch_tanh", "gelu", "feed_forward_proj")

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, object]:
        values = super()._read(reader)
        act, gated = _read_projection(reader)
        # transformers writes these beside the projection, which is the only key it reads.
        for key in ("dense_act_fn", "is_gated_act", "is_decoder"):
            reader.value(key)
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
