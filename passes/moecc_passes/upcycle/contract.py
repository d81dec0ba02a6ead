"""The promise of an upcycling, by the lemmas of ``docs/exactness.md``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import sqrt

from moecc.pipeline.passes import Preserves, weakest
from moecc_passes.upcycle.gates import GateLaw


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
        from moecc_passes.upcycle.gate_moments import gate_moments

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
