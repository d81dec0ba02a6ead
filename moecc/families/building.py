"""Build the graph of any typed config, whatever the shape of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moecc.errors import InputError
from moecc.families.bert import BertConfig
from moecc.families.config import ModelConfig
from moecc.families.decoder import DecoderConfig
from moecc.families.encdec import EncDecConfig
from moecc.families.gpt import GptConfig
from moecc.families.graphs.decoder import build_decoder
from moecc.families.graphs.parameters import DtypeOf
from moecc.families.graphs.stored import build_graph
from moecc.families.st_moe import GraphConfig, StMoeConfig
from moecc.families.vision import VisionConfig
from moecc.families.whisper import WhisperConfig
from moecc.ir.graph import Graph
from moecc.support.process import gc_paused
from moecc.types import Size


@dataclass(frozen=True, slots=True)
class GraphRequest:
    """What a graph is built with, beside its config.

    Attributes:
      dtype_of: the element type of each tensor on disk; float32 by default.
      checkpoint: the path of the weights.
      layout: how experts are stored on disk, see `moecc.families.graphs.parameters.LAYOUTS`.
      padding: whether there is an input ``mask``.
      batch: the size of the batch axis.
      seq: the length of the sequences, in an encoder-decoder those of the encoder.
      decoder_seq: the length of the decoder's.
    """

    dtype_of: DtypeOf | None = None
    checkpoint: str = ""
    layout: str = "experts"
    padding: bool = False
    batch: Size = "B"
    seq: Size = "S"
    decoder_seq: Size = "T"


GraphBuilder = Callable[[Any, GraphRequest], Graph]
"""Builds the graph of a config of one class."""


def _decoder(config: DecoderConfig, r: GraphRequest) -> Graph:
    return build_decoder(
        config, r.dtype_of, r.checkpoint, layout=r.layout, batch=r.batch, seq=r.seq
    )


# Only the builder of a model's own shape is imported: a decoder needs none of the others.
def _encdec(config: EncDecConfig, r: GraphRequest) -> Graph:
    from moecc.families.graphs.encdec import build_encdec

    return build_encdec(
        config, r.dtype_of, r.checkpoint,
        layout="stacked" if isinstance(config, StMoeConfig) else r.layout,
        padding=r.padding, batch=r.batch, seq=r.seq, decoder_seq=r.decoder_seq,
    )  # fmt: skip


def _gpt(config: GptConfig, r: GraphRequest) -> Graph:
    from moecc.families.graphs.gpt import build_gpt

    return build_gpt(config, r.dtype_of, r.checkpoint, batch=r.batch, seq=r.seq)


def _bert(config: BertConfig, r: GraphRequest) -> Graph:
    from moecc.families.graphs.bert import build_bert

    return build_bert(config, r.dtype_of, r.checkpoint, padding=r.padding, batch=r.batch, seq=r.seq)


def _vision(config: VisionConfig, r: GraphRequest) -> Graph:
    from moecc.families.graphs.vision import build_vision

    return build_vision(config, r.dtype_of, r.checkpoint, batch=r.batch)


def _whisper(config: WhisperConfig, r: GraphRequest) -> Graph:
    from moecc.families.graphs.whisper import build_whisper

    return build_whisper(config, r.dtype_of, r.checkpoint, batch=r.batch, decoder_seq=r.decoder_seq)


def _stored(config: GraphConfig, r: GraphRequest) -> Graph:
    return build_graph(config, r.dtype_of, r.checkpoint)


BUILDERS: dict[type[ModelConfig], GraphBuilder] = {
    DecoderConfig: _decoder,
    EncDecConfig: _encdec,
    GptConfig: _gpt,
    BertConfig: _bert,
    VisionConfig: _vision,
    WhisperConfig: _whisper,
    GraphConfig: _stored,
}
"""What builds the graph of each class of config, and of those derived from it."""


def build_model(
    config: ModelConfig,
    dtype_of: DtypeOf | None = None,
    checkpoint: str = "",
    *,
    layout: str = "experts",
    padding: bool = False,
    batch: Size = "B",
    seq: Size = "S",
    decoder_seq: Size = "T",
) -> Graph:
    """Return the graph of `config`; the arguments are those of `GraphRequest`.

    Raises:
      InputError: `padding` is requested of a model without a mask, or a config's graph is invalid.
    """
    if padding and not config.takes_mask:
        raise InputError(
            f"{config.kind} takes no mask", where=config.model_type, hint=config.mask_hint
        )
    request = GraphRequest(dtype_of, checkpoint, layout, padding, batch, seq, decoder_seq)
    build = next((BUILDERS[c] for c in type(config).__mro__ if c in BUILDERS), None)
    if build is None:
        raise TypeError(f"no builder for {type(config).__name__}")
    # The graph of a model with 2048 experts per layer has several hundred thousand objects.
    with gc_paused():
        return build(config, request)
