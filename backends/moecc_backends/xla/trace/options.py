"""What may be chosen when a graph is lowered."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from moecc.errors import Problem, UsageError, nearest
from moecc.ir.attention_kernels import ATTENTIONS
from moecc.ir.dispatch_strategies import DISPATCHES

AUTO = "auto"
"""The dispatch lowering is chosen for each routing by platform and shape."""

PLATFORMS = ("cpu", "gpu", "tpu")


@dataclass(frozen=True)
class Options:
    """Choices for the lowering of a graph.

    Attributes:
      dispatch: one of `DISPATCHES`, or ``auto``.
      platform: one of `PLATFORMS`; None for that of the devices at hand.
      attention: one of `ATTENTIONS`, or ``auto``.
      poison: fill padding rows, which have no token, with NaN, to see that nothing reads them.
      in_place: whether every expert has arrays of its own, which are read where they are.

    Raises:
      UsageError: there is no such lowering, kernel or platform.
    """

    dispatch: str = AUTO
    platform: str | None = None
    attention: str = AUTO
    poison: bool = False
    in_place: bool = False

    def __post_init__(self) -> None:
        problems = _unknown("dispatch lowering", self.dispatch, (AUTO, *DISPATCHES))
        problems += _unknown("attention kernel", self.attention, (AUTO, *ATTENTIONS))
        if self.platform is not None:
            problems += _unknown("platform", self.platform, PLATFORMS)
        if problems:
            raise UsageError(problems)

    @property
    def target(self) -> str:
        """The platform that is lowered for."""
        return self.platform or str(jax.default_backend())


def _unknown(what: str, name: str, known: tuple[str, ...]) -> list[Problem]:
    if name in known:
        return []
    return [
        Problem(f"unknown {what} {name!r}", expected=", ".join(known), hint=nearest(name, known))
    ]


DEFAULTS = Options()
"""Everything chosen by platform and shape."""
