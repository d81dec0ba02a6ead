"""The law of the pass ``decode``: in steps a graph has the logits that it has at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from moecc.analysis.head import LOGITS
from moecc.backend import get_backend
from moecc.decoding.batch import NOWHERE
from moecc.decoding.graphs import CAPACITY, DecodeGraphs
from moecc.decoding.session import PlainSession
from moecc.ir.graph import Graph
from moecc.testing.comparing import TOLERANCE
from moecc.types.arrays import Array, Arrays
from moecc.types.dtypes import F64


def run_in_steps(graph: Graph, params: Arrays, inputs: Arrays, parts: Iterable[int]) -> Array:
    """Return the logits of all tokens, of which `parts` are given to the decode graph at a time.

    Args:
      graph: the graph of a decoder, or of an encoder-decoder.
      params: its parameters by name.
      inputs: its inputs by name.
      parts: how many tokens each step takes; all steps together take them all.
    """
    graphs = DecodeGraphs.of(graph)
    tokens = inputs[graphs.tokens]
    texts, places = tokens.shape[0], tokens.shape[1] + 1
    session = PlainSession(get_backend("reference"), params, F64)
    for name, cache in graphs.caches.items():
        sizes = {cache.type.sizes[0]: texts, CAPACITY: places}
        shape = [s if isinstance(s, int) else sizes[s] for s in cache.type.sizes]
        session.keep({name: np.zeros(shape)})
    if graphs.encode is not None:
        session.keep(session.run(graphs.encode, {n: inputs[n] for n in graphs.encode.inputs}))
    known, found, at = np.full((texts, places), NOWHERE), [], 0
    for count in parts:
        here = np.tile(np.arange(at, at + count), (texts, 1))
        known[:, at : at + count] = here
        given: dict[str, Array] = {graphs.tokens: tokens[:, at : at + count], "positions": here,
                 "key_positions": known, "start": np.array(at)}  # fmt: skip
        made = session.run(graphs.step, {n: a for n, a in given.items() if n in graphs.step.inputs})
        found.append(made[LOGITS])
        at += count
    return np.concatenate(found, axis=1)


def step_error(graph: Graph, params: Arrays, inputs: Arrays, parts: Sequence[int]) -> float:
    """Return how far the logits of `graph` in steps are from those at once, of the largest."""
    whole = get_backend("reference").compile(graph, dtype=F64).run(params, inputs)[LOGITS]
    stepped = run_in_steps(graph, params, inputs, parts)
    scale = float(np.abs(whole).max()) or 1.0
    return float(np.abs(stepped - whole).max()) / scale


def check_decode(graph: Graph, params: Arrays, inputs: Arrays, parts: Sequence[int]) -> None:
    """Check that `graph` has the same logits in steps and at once, up to the order of sums."""
    error = step_error(graph, params, inputs, parts)
    if not error <= TOLERANCE:
        raise AssertionError(f"logits differ by {error:.2g} of the largest, in steps of {parts}")
