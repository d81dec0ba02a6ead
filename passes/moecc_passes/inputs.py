"""The inputs of a graph that belong to its tokens: their ids, and which of them are padding."""

from __future__ import annotations

from collections.abc import Sequence

from moecc.ir.dtypes import PRED
from moecc.ir.graph import Graph, Value
from moecc.ir.types import TensorType


def is_decoder(loc: str) -> bool:
    """Return whether `loc` is a place in the decoder of an encoder-decoder."""
    return loc == "decoder" or loc.startswith("decoder.")


def token_ids(graph: Graph, like: TensorType, tokens: Sequence[str], loc: str) -> Value | None:
    """Return the input that holds the ids of the tokens of a layer, or None.

    Args:
      graph: the graph.
      like: the type of a value of the layer.
      tokens: the axes of `like` that number tokens.
      loc: the place of the layer: two stacks may have sequences of one length.
    """
    fitting = [
        v
        for v in graph.inputs.values()
        if v.type.dtype.kind == "int" and _same_tokens(v.type, like, tokens)
    ]
    mine = [v for v in fitting if v.name.startswith("decoder") == is_decoder(loc)]
    return next(iter(mine or fitting), None)


def padding_mask(
    graph: Graph, name: str, like: TensorType, tokens: Sequence[str], loc: str
) -> Value | None:
    """Return the input `name`, true for tokens and false for padding, made where it is missing.

    In the decoder of an encoder-decoder it is called ``decoder_NAME``.  None where an input of
    that name is something else.
    """
    chosen = f"decoder_{name}" if is_decoder(loc) else name
    there = graph.inputs.get(chosen)
    if there is not None:
        fits = there.type.dtype == PRED and _same_tokens(there.type, like, tokens)
        return there if fits else None
    if chosen in graph:
        return None
    axes = tuple(like[n] for n in tokens)
    return graph.input(chosen, TensorType(PRED, axes))


def _same_tokens(type: TensorType, like: TensorType, tokens: Sequence[str]) -> bool:
    return set(type.names) == set(tokens) and all(type[n].size == like[n].size for n in tokens)
