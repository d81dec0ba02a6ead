"""What an upcycling promises, by the lemmas of ``docs/exactness.md``."""

from __future__ import annotations

from math import sqrt

from moecc.pipeline.passes import Preserves
from moecc_passes.upcycle.gates import GateLaw


def gates_promise(law: GateLaw, logit_std: float | None) -> Preserves:
    """Return what the gates do to the function.

    Args:
      law: the sum of the gates.
      logit_std: the standard deviation of the router's logits; None where it is not known yet.
    """
    if law.is_constant or logit_std == 0:
        return Preserves("reassociation")
    what = f"{law.gates} gates do not add up to a constant unless the router is zero"
    error = None if logit_std is None else law.predicted_error(logit_std)
    return Preserves("approximate", what, error)


def noise_promise(std: float, relative: bool, top_k: int, matrices: int) -> Preserves:
    """Return what noise on the experts does: each matrix errs by λ, and k experts are averaged."""
    what = f"{'relative' if relative else 'absolute'} noise of std {std:g} on every expert"
    return Preserves("approximate", what, std * sqrt(matrices / top_k) if relative else None)


def drop_promise(ratio: float, top_k: int) -> Preserves:
    """Return what drawing neurons anew does.

    Of independent neurons a share r is lost in each of k averaged experts and replaced by noise of
    the same size: the squared relative error is r² + r (1 − r) / k + r / k.
    """
    what = f"a share of {ratio:g} of the neurons of every expert is drawn anew"
    error = sqrt(ratio**2 + ratio * (2 - ratio) / top_k)
    return Preserves("approximate", what, error)


def placement_promise(matrices: int, scale: float) -> Preserves:
    """Return what the published placement of the scale does."""
    what = (
        f"scale-placement=cube-root puts {scale:g}^(1/{matrices}) before the activation too, which "
        "is exact only for activations that are homogeneous"
    )
    return Preserves("approximate", what)
