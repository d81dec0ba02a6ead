"""The sum of the gates of the chosen experts, and the factor on weights that follows from it.

With N experts in E = N/G virtual groups of G slices, a chosen group whose members have gate w adds
w times the dense block, so the sparse block gives (Σ w / G) · s times it, where s scales the last
matrix.  It equals the dense block where s = G / Σ w (lemmas L1 and L2 of ``docs/exactness.md``):
for any router where Σ w is constant, and only for a zero router where it is not.
"""

from __future__ import annotations

from dataclasses import dataclass

from moecc.ir.gates import Gates, convention


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
