"""Build the graph of any typed config, whatever the shape of the model."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from moecc.errors import InputError
from moecc.families.bert import BertConfig
from moecc.families.config import ModelConfig
from moecc.families.decoder import DecoderConfig
from moecc.families.encdec import EncDecConfig
from moecc.families.gpt import GptConfig
from moecc.families.graphs.parameters import DtypeOf, GraphRequest
from moecc.families.st_moe import GraphConfig, StMoeConfig
from moecc.families.vision import VisionConfig
from moecc.families.whisper import WhisperConfig
from moecc.ir.graph import Graph
from moecc.support.process import gc_paused
from moecc.types import Size

GraphBuilder = Callable[[Any, GraphRequest], Graph]
"""Builds the graph of a config of one class."""


def _of_shape(name: str) -> GraphBuilder:
    """Return the builder of a module of `moecc.families.graphs`, which is imported on first use."""

    def build(config: ModelConfig, request: GraphRequest) -> Graph:
        module: Any = import_module(f"moecc.families.graphs.{name}")
        graph: Graph = module.build(config, request)
        return graph

    return build


BUILDERS: dict[type[ModelConfig], GraphBuilder] = {
    DecoderConfig: _of_shape("decoder"),
    EncDecConfig: _of_shape("encdec"),
    GptConfig: _of_shape("gpt"),
    BertConfig: _of_shape("bert"),
    VisionConfig: _of_shape("vision"),
    WhisperConfig: _of_shape("whisper"),
    GraphConfig: _of_shape("stored"),
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
    if isinstance(config, StMoeConfig):
        layout = "stacked"
    request = GraphRequest(dtype_of, checkpoint, layout, padding, batch, seq, decoder_seq)
    build = next((BUILDERS[c] for c in type(config).__mro__ if c in BUILDERS), None)
    if build is None:
        raise TypeError(f"no builder for {type(config).__name__}")
    # The graph of a model with 2048 experts per layer has several hundred thousand objects.
    with gc_paused():
        return build(config, request)
