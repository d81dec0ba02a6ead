"""The inputs that belong to a graph's tokens: their ids and their padding mask."""

from __future__ import annotations

from collections.abc import Sequence

from moecc.errors import Problem
from moecc.ir.graph import Graph, Value
from moecc.types import PRED, TensorType


def is_decoder(loc: str) -> bool:
    """Return whether `loc` is a location in the decoder of an encoder-decoder."""
    return loc == "decoder" or loc.startswith("decoder.")


def token_ids(graph: Graph, like: TensorType, tokens: Sequence[str], loc: str) -> Value | None:
    """Return the input that holds the ids of the tokens of a layer, or None.

    Args:
      graph: the graph.
      like: the type of a value of the layer.
      tokens: the axes of `like` that number tokens.
      loc: the location of the layer: two stacks may have sequences of one length.
    """
    fitting = [
        v
        for v in graph.inputs.values()
        if v.type.dtype.kind == "int" and _same_tokens(v.type, like, tokens)
    ]
    mine = [v for v in fitting if v.name.startswith("decoder") == is_decoder(loc)]
    return next(iter(mine or fitting), None)


def mask_name(loc: str) -> str:
    """Return the name of the input that is true for tokens and false for padding."""
    return "decoder_mask" if is_decoder(loc) else "mask"


def mask_misfit(graph: Graph, like: TensorType, tokens: Sequence[str], loc: str) -> Problem | None:
    """Return why an input with the name of a layer's padding mask is not one, or None."""
    there = graph.inputs.get(mask_name(loc))
    if there is None or (there.type.dtype == PRED and _same_tokens(there.type, like, tokens)):
        return None
    wanted = TensorType(PRED, tuple(like[n] for n in tokens))
    return Problem(f"%{there.name} is not a padding mask", loc, str(wanted), str(there.type))


def padding_mask(graph: Graph, like: TensorType, tokens: Sequence[str], loc: str) -> Value:
    """Return the padding mask of a layer, an input that is added if it is missing.

    Args:
      graph: the graph, for which `mask_misfit` returns None.
      like: the type of a value of the layer.
      tokens: the axes of `like` that number tokens.
      loc: the location of the layer.
    """
    name = mask_name(loc)
    if name in graph.inputs:
        return graph.inputs[name]
    return graph.input(name, TensorType(PRED, tuple(like[n] for n in tokens)))


def _same_tokens(type: TensorType, like: TensorType, tokens: Sequence[str]) -> bool:
    return set(type.names) == set(tokens) and all(type[n].size == like[n].size for n in tokens)
