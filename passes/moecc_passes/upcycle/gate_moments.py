"""Gates of random tokens under one law, and the moments of their sum: what upcycling is off by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from moecc.ir.gates import convention
from moecc.types.arrays import Doubles as Array
from moecc_passes.upcycle.gates import GateLaw

SAMPLES = 4096
"""Random tokens from which the moments of the gates are estimated."""


@dataclass(frozen=True)
class GateMoments:
    """Moments of the gates over tokens, where 1 is the dense block.

    Attributes:
      ratio: the mean of ρ = s · Σ w / G.
      squared: the mean of ρ².
      concentration: the mean of ρ² · Σ a², with a the share of Σ w of each chosen group: 1 / k for
        k equal gates.  Errors that the copies make independently are averaged by it.
    """

    ratio: float
    squared: float
    concentration: float


@lru_cache(maxsize=256)
def gate_moments(law: GateLaw, logit_std: float) -> GateMoments:
    """Return the moments of ρ = s · Σ w / G over tokens whose logits are normal.

    Args:
      law: the sum of the gates.
      logit_std: the standard deviation of the router's logits.
    """
    if logit_std == 0:
        return GateMoments(1.0, 1.0, law.granularity / law.top_k)
    rng = np.random.default_rng(0)
    groups = rng.normal(0, logit_std, (SAMPLES, law.experts // law.granularity))
    gates = gates_of(law, np.repeat(groups, law.granularity, axis=1))
    of_groups = gates.reshape(SAMPLES, -1, law.granularity).sum(2) / law.total
    ratio = of_groups.sum(1)
    return GateMoments(
        float(ratio.mean()), float(np.mean(ratio**2)), float((of_groups**2).sum(1).mean())
    )


def gates_of(law: GateLaw, logits: Array) -> Array:
    """Return the gates ``[tokens, choice]``, largest logit first, of ``[tokens, expert]``."""
    k = law.top_k
    if law.has_prototypes:
        parts = logits.reshape(len(logits), k, -1)
        gates: Array = 1 / np.exp(parts - parts.max(2, keepdims=True)).sum(2)
    else:
        best = -np.sort(-logits, axis=1, kind="stable")
        gates = MEANINGS[law.convention](best, k)
    if convention(law.convention).renormalised:
        gates = gates / gates.sum(1, keepdims=True)
    return gates * law.gate_scale


def _softmax(best: Array, top_k: int) -> Array:
    share = np.exp(best - best[:, :1])
    gates: Array = share[:, :top_k] / share.sum(1, keepdims=True)
    return gates


def _sigmoid(best: Array, top_k: int) -> Array:
    gates: Array = 1 / (1 + np.exp(-best[:, :top_k]))
    return gates


def _sparsemixer(best: Array, top_k: int) -> Array:
    return np.stack([_nearest(best, chosen) for chosen in range(top_k)], axis=1)


def _nearest(best: Array, chosen: int, jitter: float = 0.01) -> Array:
    """Return the gate of the choice number `chosen` among the sorted logits `best` (PhiMoE)."""
    left = best[:, chosen:]
    top = left[:, :1]
    near = (top - left) / np.maximum(np.abs(left), np.abs(top)).clip(1e-30) <= 2 * jitter
    gate: Array = 1 / np.where(near, np.exp(left - top), 0).sum(1)
    return gate


def _ones(best: Array, top_k: int) -> Array:
    return np.ones((len(best), top_k))


MEANINGS: dict[str, Callable[[Array, int], Array]] = {
    "renormalised": _softmax,
    "softmax": _softmax,
    "sigmoid-renormalised": _sigmoid,
    "sigmoid": _sigmoid,
    "sparsemixer": _sparsemixer,
    "ones": _ones,
}
"""Gates ``[tokens, choice]`` of logits ``[tokens, expert]``, largest first, by convention, before
any division by their sum: as the reference has them, for thousands of tokens at once."""
