"""The sum of the gates of the chosen experts, and the factor on weights that follows from it.

With N experts in E = N/G virtual groups of G slices, a chosen group whose members have gate w adds
w times the dense block, so the sparse block gives (Σ w / G) · s times it, where s scales the last
matrix.  It equals the dense block where s = G / Σ w (lemmas L1 and L2 of ``docs/exactness.md``):
for any router where Σ w is constant, and only for a zero router where it is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from moecc.ir.gates import Gates, convention
from moecc.types.arrays import Doubles as Array

SAMPLES = 4096
"""Random tokens from which the moments of the gates are estimated."""


@dataclass(frozen=True)
class GateLaw:
    """The sum of the gates under one convention.

    Attributes:
      convention: the gate convention, as in ``route``.
      experts: N, the stored experts.
      top_k: k, the experts a token goes to.
      granularity: G, the slices of the dense block that make up one group.
      gate_scale: the factor of ``route`` on the gates.
      has_prototypes: whether the experts are k groups with a softmax and one choice each.
    """

    convention: Gates
    experts: int
    top_k: int
    granularity: int = 1
    gate_scale: float = 1.0
    has_prototypes: bool = False

    @property
    def is_constant(self) -> bool:
        """Whether the sum of the gates is the same for every router."""
        return convention(self.convention).sum_is_constant(self.experts, self.top_k)

    @property
    def total(self) -> float:
        """The sum of the gates; if it is not constant, that of a zero router."""
        # Each prototype is one of k groups with its own softmax, so the sum is k times as large.
        choices = self.top_k**2 if self.has_prototypes else self.top_k
        return convention(self.convention).zero_router_sum(self.experts, choices) * self.gate_scale

    @property
    def weight_scale(self) -> float:
        """The factor s = G / Σ w that an expert's matrices take together."""
        return self.granularity / self.total

    @property
    def bias_scale(self) -> float:
        """1 / Σ w, the factor that an output bias takes in every expert."""
        return 1 / self.total

    def moments(self, logit_std: float) -> GateMoments:
        """Return the moments of ρ = s · Σ w / G over tokens whose logits are normal.

        Args:
          logit_std: the standard deviation of the router's logits.
        """
        return _moments(self, logit_std)

    def gates(self, logits: Array) -> Array:
        """Return the gates ``[tokens, choice]``, largest logit first, of ``[tokens, expert]``."""
        k = self.top_k
        if self.has_prototypes:
            parts = logits.reshape(len(logits), k, -1)
            gates: Array = 1 / np.exp(parts - parts.max(2, keepdims=True)).sum(2)
        else:
            best = -np.sort(-logits, axis=1, kind="stable")
            gates = MEANINGS[self.convention](best, k)
        if convention(self.convention).renormalised:
            gates = gates / gates.sum(1, keepdims=True)
        return gates * self.gate_scale


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
def _moments(law: GateLaw, logit_std: float) -> GateMoments:
    if logit_std == 0:
        return GateMoments(1.0, 1.0, law.granularity / law.top_k)
    rng = np.random.default_rng(0)
    groups = rng.normal(0, logit_std, (SAMPLES, law.experts // law.granularity))
    gates = law.gates(np.repeat(groups, law.granularity, axis=1))
    of_groups = gates.reshape(SAMPLES, -1, law.granularity).sum(2) / law.total
    ratio = of_groups.sum(1)
    return GateMoments(
        float(ratio.mean()), float(np.mean(ratio**2)), float((of_groups**2).sum(1).mean())
    )


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
