"""Build the graph of any typed config, whatever the shape of the model."""

from __future__ import annotations

from moecc.errors import InputError
from moecc.families.bert import build_bert
from moecc.families.configs import (
    BertConfig,
    DecoderConfig,
    EncDecConfig,
    GptConfig,
    GraphConfig,
    ModelConfig,
    StMoeConfig,
)
from moecc.families.decoder import build_decoder
from moecc.families.encdec import build_encdec
from moecc.families.gpt import build_gpt
from moecc.families.graph_layout import build_graph
from moecc.families.parameters import DtypeOf
from moecc.ir.graph import Graph
from moecc.support.gc_pause import gc_paused
from moecc.types.tensor import Size


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
    """Return the graph of `config`.

    Args:
      config: a config of any family.
      dtype_of: the element type of each tensor on disk; float32 by default.
      checkpoint: the path of the weights.
      layout: how experts are stored on disk, see `moecc.families.parameters.LAYOUTS`.
      padding: whether an encoder has an input ``mask``; a decoder-only model needs none.
      batch: the size of the batch axis.
      seq: the length of the sequences, in an encoder-decoder those of the encoder.
      decoder_seq: the length of the decoder's.

    Raises:
      InputError: `padding` is requested of a decoder-only model, or a config's graph is invalid.
    """
    if padding and isinstance(config, DecoderConfig | GptConfig):
        raise InputError(
            "a decoder alone takes no mask",
            where=config.model_type,
            hint="padding after a text changes nothing: no earlier token attends to it",
        )
    # The graph of a model with 2048 experts per layer has several hundred thousand objects.
    with gc_paused():
        return _build(
            config,
            dtype_of,
            checkpoint,
            layout="stacked" if isinstance(config, StMoeConfig) else layout,
            padding=padding,
            sizes=(batch, seq, decoder_seq),
        )


def _build(
    config: ModelConfig,
    dtype_of: DtypeOf | None,
    checkpoint: str,
    *,
    layout: str,
    padding: bool,
    sizes: tuple[Size, Size, Size],
) -> Graph:
    batch, seq, decoder_seq = sizes
    match config:
        case DecoderConfig():
            return build_decoder(config, dtype_of, checkpoint, layout=layout, batch=batch, seq=seq)
        case EncDecConfig():
            return build_encdec(
                config, dtype_of, checkpoint, layout=layout, padding=padding, batch=batch,
                seq=seq, decoder_seq=decoder_seq,
            )  # fmt: skip
        case GptConfig():
            return build_gpt(config, dtype_of, checkpoint, batch=batch, seq=seq)
        case BertConfig():
            return build_bert(config, dtype_of, checkpoint, padding=padding, batch=batch, seq=seq)
        case GraphConfig():
            return build_graph(config, dtype_of, checkpoint)
    raise TypeError(f"no builder for {type(config).__name__}")
