"""What is wrong with the routers of a run, as its metrics say: dead experts, saturation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import log

from moecc.train.events import Metric

PREFIX = "metric."
DEAD_STEPS = 50
"""An expert without a row for so many steps in a row is dead."""

SATURATED_ENTROPY = 0.1
"""A router whose entropy is below this part of the largest one chooses without looking."""

SATURATED_STEPS = 20


@dataclass(frozen=True)
class Alarm:
    """Something that went wrong in a layer, first seen at a step."""

    step: int
    layer: str
    what: str

    def __str__(self) -> str:
        return f"step {self.step:,}: {self.layer}: {self.what}"


@dataclass
class Watch:
    """Watches the metrics of a run, and raises each alarm once while it lasts.

    Attributes:
      counts: for how many steps in a row something has been wrong, by layer and what.
    """

    counts: dict[tuple[str, str], int] = field(default_factory=dict)

    def __call__(self, step: int, metrics: Mapping[str, Metric]) -> list[Alarm]:
        """Return the alarms that a step sets off."""
        found = []
        for layer, what, is_wrong, limit in _findings(metrics):
            key = (layer, what)
            self.counts[key] = self.counts.get(key, 0) + 1 if is_wrong else 0
            if self.counts[key] == limit:
                found.append(Alarm(step, layer, what))
        return found


def _findings(metrics: Mapping[str, Metric]) -> list[tuple[str, str, bool, int]]:
    """Return layer, what may be wrong, whether it is, and for how many steps it has to be."""
    found = []
    for name, value in metrics.items():
        layer, _, kind = name.removeprefix(PREFIX).rpartition(".")
        if not name.startswith(PREFIX):
            continue
        if kind == "loads" and isinstance(value, list):
            for expert, load in enumerate(value):
                what = f"expert {expert} got no row for {DEAD_STEPS} steps"
                found.append((layer, what, load == 0, DEAD_STEPS))
        loads = metrics.get(f"{PREFIX}{layer}.loads")
        if kind == "entropy" and isinstance(value, float) and isinstance(loads, list):
            is_low = value < SATURATED_ENTROPY * log(max(len(loads), 2))
            what = f"the router is saturated: its entropy is below {SATURATED_ENTROPY:.0%}"
            found.append((layer, what, is_low, SATURATED_STEPS))
    return found
