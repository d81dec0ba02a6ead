"""The meaning of attention as one operation."""

from __future__ import annotations

import numpy as np

from moecc_backends.reference.arrays import Array, Data, meaning
from moecc_backends.reference.attention import in_segment, seen_from
from moecc_backends.reference.contraction import product


@meaning("attention")
def attention(
    query: Array,
    key: Array,
    value: Array,
    *more: Array,
    over: str,
    along: str,
    scale: float,
    cap: float,
    causal: tuple[str, ...],
    window: int,
    given: tuple[str, ...],
) -> Array:
    """Return the values, averaged by the softmax of what each query sees of its scores."""
    further = dict(zip(given, more, strict=True))
    scores = product(query, key, (over,)).map(lambda d: d * scale)
    if cap:
        scores = scores.map(lambda d: cap * np.tanh(d / cap))
    if "bias" in further:
        bias = further["bias"].to(scores.axes)
        scores = scores.map(lambda d: d + bias)
    for axis in causal:
        places = (_places(scores, axis), _places(scores, along))
        scores = _masked(scores, seen_from(*places, window))
    if "keep" in further:
        scores = _masked(scores, further["keep"])
    if "query_segments" in further:
        scores = _masked(scores, in_segment(further["query_segments"], further["key_segments"]))
    weights = scores.map(lambda d: _weights(d, scores.axes.index(along), _sink(further, scores)))
    return product(weights, value, (along,))


def _places(scores: Array, axis: str) -> Array:
    return Array(np.arange(scores.size(axis)), (axis,))


def _masked(scores: Array, seen: Array) -> Array:
    return scores.map(lambda d: np.where(seen.to(scores.axes), d, -np.inf))


def _sink(given: dict[str, Array], scores: Array) -> Data:
    """Return the score that no value belongs to; −∞ is none."""
    return given["sinks"].to(scores.axes) if "sinks" in given else np.array(-np.inf)


def _weights(scores: Data, axis: int, sink: Data) -> Data:
    """Return the softmax along `axis` of the scores and one more, less the one; zeros if all −∞."""
    top = np.maximum(scores.max(axis, keepdims=True), sink)
    top = np.where(top == -np.inf, 0, top)
    parts = np.exp(scores - top)
    total = parts.sum(axis, keepdims=True) + np.exp(sink - top)
    return np.asarray(parts / np.where(total == 0, 1, total))
