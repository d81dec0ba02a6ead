"""What each way to the experts and back costs; the ways are the rows of `moecc.sharding.vias`."""

from __future__ import annotations

from dataclasses import dataclass

from moecc.sharding.vias import ROUND_ROOM, WAYS
from moecc.sharding.vias import via as way_of

SLICED = tuple(way.name for way in WAYS if way.is_sliced and not way.per_axis)
"""Those that a plan tries in slices: devices that share the neurons of a row send a part each."""

BOUND = 1.25
"""The capacity factor of an exchange whose experts take every token in the graph."""


@dataclass(frozen=True)
class Rows:
    """The tokens and rows of one device at one sparse layer.

    Attributes:
      tokens: tokens.
      rows: rows that the graph asks for, the padding of its capacity included.
      row_bytes: of one row, or of one token.
      devices: of the experts' axes.
      top_k: choices of a token.
      experts: how many there are.
      dropless: whether every token is taken.
      in_rounds: whether a dropless exchange has as many rounds as its rows need.
    """

    tokens: float
    rows: float
    row_bytes: float
    devices: int
    top_k: int
    experts: int
    dropless: bool
    in_rounds: bool = False

    def factor(self, via: str) -> float:
        """Return how many rows are computed for each row of the graph."""
        return 1.0 if exact(via, self.dropless) else BOUND

    def buffer_rows(self, via: str) -> float:
        """Return the rows that a device must have room for.

        Dropless, the worst case is that all choices of all devices fall on one: a token has at most
        one row for each expert there.  In rounds there is room for somewhat more than the mean.
        """
        way = way_of(via)
        if not self.dropless or way is None or way.is_bounded:
            return self.rows * self.factor(via)
        most = min(self.top_k, self.experts // self.devices)
        worst = self.tokens * most * (1 if way.tokens_everywhere else self.devices)
        return min(worst, ROUND_ROOM * self.rows) if self.in_rounds else worst


def exact(via: str, dropless: bool) -> bool:
    """Whether an exchange loses no row that the graph keeps."""
    way = way_of(via)
    return way is None or not (way.is_bounded and dropless)
