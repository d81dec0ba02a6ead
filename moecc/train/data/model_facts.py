"""What batches need to know of a model: its inputs, its vocabulary, its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moecc.ir.graph import Graph
from moecc.ir.indices import index_bound
from moecc.model.inputs import longest
from moecc.model.open import Model
from moecc.train.tokens.encoders import tokenizer_digest

TOKENS, DECODER_TOKENS = "tokens", "decoder_tokens"


@dataclass(frozen=True)
class ModelFacts:
    """What batches need to know of a model.

    Attributes:
      name: in messages.
      vocab: ids are below.
      inputs: the names of the graph's inputs.
      longest: the longest sequence that learned positions allow; None where nothing bounds it.
      pad: the id of padding, of its config; None without one.
      decoder_start: what a decoder begins with, of its config; None without one.
      tokenizer_digest: of the ``tokenizer.json`` beside its weights; None without one.
    """

    name: str
    vocab: int
    inputs: tuple[str, ...] = (TOKENS,)
    longest: int | None = None
    pad: int | None = None
    decoder_start: int | None = None
    tokenizer_digest: str | None = None

    @property
    def has_decoder(self) -> bool:
        """Whether it is an encoder-decoder."""
        return DECODER_TOKENS in self.inputs


def facts_of(model: Model, graph: Graph | None = None) -> ModelFacts:
    """Return the facts of `model`, whose step has the graph `graph`, its own by default."""
    graph = model.graph if graph is None else graph
    config = model.graph.attrs.get("config")
    config = config if isinstance(config, Mapping) else {}
    pad, start = config.get("pad_token_id"), config.get("decoder_start_token_id")
    return ModelFacts(
        name=model.name,
        vocab=_vocabulary(graph),
        inputs=tuple(graph.inputs),
        longest=longest(model.graph),
        pad=pad if isinstance(pad, int) and pad >= 0 else None,
        decoder_start=start if isinstance(start, int) else None,
        tokenizer_digest=_digest(model),
    )


def _vocabulary(graph: Graph) -> int:
    """Return the bound on ids: the rows of the table that looks tokens up."""
    tokens = graph.inputs.get(TOKENS)
    bound = None if tokens is None else index_bound(tokens)
    return 0 if bound is None else bound


def _digest(model: Model) -> str | None:
    companions = {} if model.checkpoint is None else model.checkpoint.companions()
    found = companions.get("tokenizer.json")
    if found is None:
        return None
    return tokenizer_digest(found.read_bytes() if isinstance(found, Path) else found)
