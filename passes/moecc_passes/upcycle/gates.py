"""The sum of the gates of the chosen experts, and the factor on weights that follows from it.

With N experts in E = N/G virtual groups of G slices, a chosen group whose members have gate w adds
w times the dense block, so the sparse block gives (Σ w / G) · s times it, where s scales the last
matrix.  It equals the dense block where s = G / Σ w (lemmas L1 and L2 of ``docs/exactness.md``):
for any router where Σ w is constant, and only for a zero router where it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import sqrt

import numpy as np

from moecc.analysis import FFNBlock
from moecc.ir.conventions import Gates, convention
from moecc.ir.graph import Node, Value
from moecc.pipeline.passes import Preserves, weakest
from moecc.types import Doubles as Array


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


# Gates of random tokens under one law, and the moments of their sum: what upcycling is off by.

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


# Placement of the factor that the gates require, and whether it scales the block (lemma L3).

Factors = Mapping[Value, float]
"""The factor of each parameter; missing ones are not scaled."""

PLACEMENTS = ("down", "up-down", "cube-root")


def scale_factors(block: FFNBlock, placement: str, scale: float) -> Factors | str:
    """Return the factor of each parameter of `block`, or why `placement` is not possible.

    ``down`` puts the whole scale on the last matrix.  ``up-down`` puts √scale there and √scale on
    a matrix in which the hidden value is linear, which for SwiGLU is ``up`` and never ``gate``.
    ``cube-root`` puts equal shares on all matrices, as published (He et al. 2024): the cube root
    for a gated block and for squared ReLU, the square root for others with two matrices.  A bias
    before the activation is scaled like the matrix before it.  Not included is a bias after the
    last matrix, which the scale does not touch.
    """
    if scale == 1:
        return {}
    chosen = _of_matrices(block, placement, scale)
    if isinstance(chosen, str):
        return chosen
    for up in block.ups:
        if up.operands[1] in chosen:
            chosen |= dict.fromkeys(block.biases_of(up), chosen[up.operands[1]])
    if placement == "cube-root" or is_scaled(block, chosen, scale):
        return chosen
    return "a parameter is used in two positions that would need different factors"


def _of_matrices(block: FFNBlock, placement: str, scale: float) -> dict[Value, float] | str:
    down = block.down.operands[1]
    if placement == "down":
        return {down: scale}
    if placement == "cube-root":
        return dict.fromkeys((*block.degrees(), down), scale ** (1 / shares(block)))
    linear = [w for w, degree in block.degrees().items() if degree == 1]
    if not linear:
        return "no matrix before the activation can be scaled, because the block is linear in none"
    return {linear[-1]: scale**0.5, down: scale**0.5}


def shares(block: FFNBlock) -> int:
    """Return n where ``cube-root`` scales each matrix by the n-th root of the scale."""
    return 1 + sum(degree or 1 for degree in block.degrees().values())


def is_scaled(block: FFNBlock, factors: Factors, scale: float) -> bool:
    """Whether multiplying parameters by `factors` multiplies the block by `scale`.

    The output bias is excluded.  The result is false if the dataflow does not show it.
    """
    known: dict[Value, float | None] = {block.x: 1.0}
    for node in block.nodes:
        given = [known.get(v, factors.get(v, 1.0)) for v in node.operands]
        known[node.result] = _scaled_by(node, given)
        if node is block.down:
            break
    found = known[block.down.result]
    return found is not None and abs(found / scale - 1) < 1e-9


def _scaled_by(node: Node, given: list[float | None]) -> float | None:
    """Return the factor on the result if the operands have positive factors."""
    factors = [f for f in given if f is not None]
    if len(factors) < len(given):
        return None
    return node.op.homogeneity.factor(factors)


# The promise of an upcycling, by the lemmas of ``docs/exactness.md``.


@dataclass(frozen=True)
class Contract:
    """The changes of a block that may change its function.

    Attributes:
      law: the sum of the gates.
      logit_std: the standard deviation of the router's logits; None if unknown yet.
      drop: the share of the neurons of every expert that is redrawn.
      noise: the standard deviation of the noise on every expert.
      noise_is_relative: whether it is in units of the tensor's standard deviation.
      matrices: the matrices of an expert.
      shared: the share of the neurons that a shared expert keeps.
      placement: the effect of the scale's placement on the function; None if exact.
      capacity_factor: bounds the rows of an expert; None if nothing is dropped.
      is_soft: whether experts get averages of tokens.
      parts: the parts of a split block that a token gets, and all; None if that is all of it.
      models: the models that the experts come from; empty if from one.
    """

    law: GateLaw
    logit_std: float | None
    drop: float = 0.0
    noise: float = 0.0
    noise_is_relative: bool = True
    matrices: int = 3
    shared: float = 0.0
    placement: str | None = None
    capacity_factor: float | None = None
    is_soft: bool = False
    parts: tuple[int, int] | None = None
    models: tuple[str, ...] = ()

    @property
    def preserves(self) -> Preserves:
        """The promise for a block, with the expected error of its output."""
        reasons = "; ".join(self._reasons())
        if not reasons:
            return Preserves("reassociation")
        return Preserves("approximate", reasons, self._predicted_error())

    def _reasons(self) -> Iterator[str]:
        if self.is_soft:
            yield "a soft mixture gives experts averages of tokens, and the block is not linear"
        if not (self.law.is_constant or self.logit_std == 0 or self.parts is not None):
            gates = self.law.convention
            yield f"{gates} gates do not add up to a constant unless the router is zero"
        if self.noise:
            kind = "relative" if self.noise_is_relative else "absolute"
            yield f"{kind} noise of std {self.noise:g} on every expert"
        if self.drop:
            yield f"a share of {self.drop:g} of the neurons of every expert is drawn anew"
        if self.parts is not None:
            some, every = self.parts
            yield (
                f"a token gets {some} of the {every} parts of a block" if some < every
                else "gates weigh the parts of a block unequally unless the router is zero"
            )  # fmt: skip
        if self.models:
            yield f"experts come from several models: {', '.join(self.models)}"
        if self.placement:
            yield self.placement
        if self.capacity_factor is not None:
            yield f"a capacity factor of {self.capacity_factor:g} may drop choices"

    def _predicted_error(self) -> float | None:
        """Return the root mean square error of a block of many independent neurons, or None.

        The chosen groups give ρ times the block, plus errors.  Of a share r of neurons that are
        drawn anew ρ·r is missing whatever the number of groups, and what varies from expert to
        expert, r (1 − r) for the choice of neurons, r for the new ones, or (1 + λ²)ᵐ − 1 for noise
        λ on m matrices, is averaged over the groups.  A shared expert takes no part in any of it.
        """
        unknown = self.logit_std is None and not self.law.is_constant
        absolute = self.noise and not self.noise_is_relative
        is_bounded = self.capacity_factor is not None
        if (
            unknown
            or absolute
            or self.placement
            or is_bounded
            or self.is_soft
            or self.models
            or self.parts
        ):
            return None
        # Only here: it imports numpy, which most uses of a pass do not need.

        found = gate_moments(self.law, self.logit_std or 0.0)
        kept = 1 - self.drop
        varies = self.drop * (2 - self.drop) + (1 + self.noise**2) ** self.matrices - 1
        common = 1 - 2 * kept * found.ratio + kept**2 * found.squared
        return sqrt(max(common + varies * found.concentration, 0.0) * (1 - self.shared))


def of_blocks(promises: Sequence[Preserves]) -> Preserves:
    """Return the promise for a model whose blocks were changed so: the error is the worst block's.

    Args:
      promises: those of the blocks, at least one.
    """
    joined = weakest(dict.fromkeys(promises))
    if joined.predicted_error is None:
        return joined
    return replace(joined, predicted_error=max(p.predicted_error or 0.0 for p in promises))


def inexact_placement(shares: int, scale: float) -> str:
    """Return why the published placement of the scale is not exact."""
    return (
        f"scale-placement=cube-root puts {scale:g}^(1/{shares}) before the activation too, which "
        "is exact only for activations that are homogeneous"
    )
