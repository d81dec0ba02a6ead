"""What happens in a training loop: a stream that command line, notebooks and tests read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from math import inf, isfinite
from pathlib import Path

from moecc.support.untyped import JsonDict

Metric = float | list[float]
"""A number, or one for each expert."""


class Reason(Enum):
    """Why a loop ended."""

    DONE = "done"
    TERMINATED = "terminated"
    INTERRUPTED = "interrupted"
    GUARD = "guard"


@dataclass(frozen=True)
class Stepped:
    """A step was made.

    Attributes:
      step: how many are done, this one included.
      metrics: what was measured, by name; the same on any machine of one kind.
      tokens: trained on so far, padding left out.
      seconds: this step took.
    """

    step: int
    metrics: Mapping[str, Metric]
    tokens: int
    seconds: float


@dataclass(frozen=True)
class GuardFault:
    """A quantity of a step that the guard rejects.

    Attributes:
      quantity: ``loss`` or ``gradient_norm``, as the metric is called.
      value: of the step.
      limit: the largest loss that is taken; None where the value is not finite.
    """

    quantity: str
    value: float
    limit: float | None = None

    def __str__(self) -> str:
        name = self.quantity.replace("_", " ")
        if self.limit is None:
            return f"{name} {self.value}, where a finite number is needed"
        return f"{name} {self.value:.6g}, above its limit {self.limit:.6g}"

    def as_dict(self) -> JsonDict:
        """Return the fault as the journal has it: a value that is not finite is a text."""
        value = self.value if isfinite(self.value) else str(self.value)
        return {"quantity": self.quantity, "value": value, "limit": self.limit}


def guard_faults(metrics: Mapping[str, Metric], limit: float) -> tuple[GuardFault, ...]:
    """Return which quantities of a step the guard rejects.

    Args:
      metrics: of the step.
      limit: the largest loss that is taken.
    """
    faults = []
    for quantity, largest in (("loss", limit), ("gradient_norm", inf)):
        value = metrics.get(quantity)
        if not isinstance(value, float):
            continue
        if not isfinite(value):
            faults.append(GuardFault(quantity, value))
        elif value > largest:
            faults.append(GuardFault(quantity, value, largest))
    return tuple(faults)


@dataclass(frozen=True)
class Skipped:
    """A step was made and its update left out by the guard.

    Attributes:
      step: how many are done, this one included.
      metrics: what was measured.
      batch: the number of the batch.
      back_to: the step to which training returned; None where it goes on.
      left_out: the batches that are left out from there on.
      faults: why it was skipped.
    """

    step: int
    metrics: Mapping[str, Metric]
    batch: int
    back_to: int | None = None
    left_out: tuple[int, ...] = ()
    faults: tuple[GuardFault, ...] = ()


@dataclass(frozen=True)
class Evaluated:
    """Held-out losses were measured.

    Attributes:
      step: how many are done.
      losses: in nats a token, by the name of the text.
      spread: how far each expert of a layer is from the mean of all, by location: 0 for copies.
    """

    step: int
    losses: Mapping[str, float]
    spread: Mapping[str, list[float]] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """The mean over the texts."""
        return sum(self.losses.values()) / len(self.losses)


@dataclass(frozen=True)
class Saved:
    """A checkpoint is complete.

    Attributes:
      step: steps done.
      folder: where it is.
      best: whether no other has a lower held-out loss.
      seconds: from the request until it was complete.
    """

    step: int
    folder: Path
    best: bool
    seconds: float


@dataclass(frozen=True)
class Exported:
    """An export was written, read back and compared."""

    step: int
    folder: Path


@dataclass(frozen=True)
class Stopped:
    """The loop ended after `step` steps, for `reason`; the guard names the last step's faults."""

    step: int
    reason: Reason
    faults: tuple[GuardFault, ...] = ()


Event = Stepped | Skipped | Evaluated | Saved | Exported | Stopped
