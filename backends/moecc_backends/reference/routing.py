"""The meaning of routing: choices, gates, and which of them are kept."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moecc.ir.conventions import Score, convention
from moecc_backends.reference.arrays import Array, Data, meaning
from moecc_backends.reference.elementwise import logistic
from moecc_backends.reference.reduction import normalised

JITTER = 0.01
"""Half the relative distance from the best logit within which sparsemixer counts (PhiMoE)."""


@meaning("route")
def route(
    logits: Array,
    *bias: Array,
    top_k: int,
    gates: str,
    scale: float,
    axis: str,
    choice: str,
    using: tuple[str, ...],
    precision: str,
) -> tuple[Array, Array]:
    """Return the experts with the largest logits, best first, and their gates."""
    rest = tuple(a for a in logits.axes if a != axis)
    scores = logits.to((*rest, axis))
    ranked = scores
    for added in bias:
        ranked = SCORES[convention(gates).score or "softmax"](scores) + added.data
    # A stable sort orders equal logits by expert, lowest first.
    experts = np.argsort(-ranked, axis=-1, kind="stable")[..., :top_k]
    weights = GATES[gates](scores, experts) * scale
    axes = (*rest, choice)
    return Array(experts, axes), Array(weights, axes)


def _of(scores: Data, experts: Data) -> Data:
    return np.take_along_axis(scores, experts, -1)


def _renormalised(scores: Data, experts: Data) -> Data:
    return normalised(_of(scores, experts))


def _softmax(scores: Data, experts: Data) -> Data:
    return _of(normalised(scores), experts)


def _sigmoid_renormalised(scores: Data, experts: Data) -> Data:
    chosen = logistic(_of(scores, experts))
    return np.asarray(chosen / chosen.sum(-1, keepdims=True))


def _sigmoid(scores: Data, experts: Data) -> Data:
    return logistic(_of(scores, experts))


def _sparsemixer(scores: Data, experts: Data) -> Data:
    """Each choice's softmax among the logits near it; earlier choices are excluded."""
    left, gates = scores.copy(), []
    for choice in range(experts.shape[-1]):
        expert = experts[..., choice : choice + 1]
        best = _of(left, expert)
        distance = (best - scores) / np.maximum(np.abs(scores), best)
        near = np.where(distance > 2 * JITTER, -np.inf, left)
        gates.append(_of(normalised(near), expert))
        np.put_along_axis(left, expert, -np.inf, -1)
    return np.concatenate(gates, -1)


def _ones(scores: Data, experts: Data) -> Data:
    return np.ones(experts.shape)


SCORES: dict[Score, Callable[[Data], Data]] = {"softmax": normalised, "sigmoid": logistic}
"""What a routing bias is added to, by the score of the convention."""

GATES: dict[str, Callable[[Data, Data], Data]] = {
    "renormalised": _renormalised,
    "softmax": _softmax,
    "sigmoid-renormalised": _sigmoid_renormalised,
    "sigmoid": _sigmoid,
    "sparsemixer": _sparsemixer,
    "ones": _ones,
}
"""From logits `[…, expert]` and choices `[…, choice]` to gates `[…, choice]`."""


@meaning("keep_choices")
def keep_choices(
    gates: Array, *uniform: Array, policy: str, threshold: float, choice: str
) -> Array:
    """Return which choices the policy keeps; the first always."""
    rest = tuple(a for a in gates.axes if a != choice)
    values = gates.to((*rest, choice))
    keep = np.full(values.shape, policy == "all")
    if policy == "threshold":
        keep = values > threshold
    for numbers in uniform:
        keep = numbers.to((*rest, choice)) < values / max(threshold, LEAST_THRESHOLD)
    keep[..., 0] = True
    return Array(Array(keep, (*rest, choice)).to(gates.axes), gates.axes)


LEAST_THRESHOLD = 1e-9
"""Lower bound on the threshold: at 0 every gate that is not tiny is kept (mesh-tensorflow)."""


@meaning("hash_experts")
def hash_experts(
    ids: Array, *, experts: int, top_k: int, seed: int, hash: str, choice: str
) -> Array:
    """Return the hash of each id modulo the number of experts, and those after it."""
    plain = ids.data.astype(np.uint32)
    first = (plain if hash == "modulo" else hashed(ids.data, seed)) % np.uint32(experts)
    chosen = (first.astype(np.int64)[..., None] + np.arange(top_k)) % experts
    return Array(chosen, (*ids.axes, choice))


def hashed(ids: Data, seed: int) -> Data:
    """Return a hash of 32 bits: the finaliser of MurmurHash3, of the id and the seed."""
    h = np.atleast_1d(ids.astype(np.uint32)) ^ np.uint32(seed * GOLDEN % 2**32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> np.uint32(shift))) * np.uint32(factor)
    return np.asarray(h ^ (h >> np.uint32(16))).reshape(ids.shape)


GOLDEN = 0x9E3779B9
"""2³² over the golden ratio, which spreads neighbouring seeds."""
