"""What each way to the experts and back costs; the ways are the rows of `moecc.plan.vias`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moecc.plan.collectives import Transfer
from moecc.plan.vias import WAYS, Slots
from moecc.plan.vias import via as way_of

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
      tensor: devices that share the neurons.
    """

    tokens: float
    rows: float
    row_bytes: float
    devices: int
    top_k: int
    experts: int
    dropless: bool
    tensor: int = 1

    def factor(self, via: str) -> float:
        """Return how many rows are computed for each row of the graph."""
        return 1.0 if exact(via, self.dropless) else BOUND

    def buffer_rows(self, via: str) -> float:
        """Return the rows that a device must have room for.

        Dropless, the worst case is that all choices of all devices fall on one: a token has at most
        one row for each expert there.
        """
        way = way_of(via)
        if not self.dropless or way is None or way.is_bounded:
            return self.rows * self.factor(via)
        most = min(self.top_k, self.experts // self.devices)
        return self.tokens * most * (1 if way.tokens_everywhere else self.devices)


def exact(via: str, dropless: bool) -> bool:
    """Whether an exchange loses no row that the graph keeps."""
    way = way_of(via)
    return way is None or not (way.is_bounded and dropless)


def legal(via: str, devices: int, dropless: bool, axes: int = 1) -> bool:
    """Whether `via` can serve experts that lie on `devices` devices along `axes` mesh axes.

    A capacity makes rows of equal number, for which ``ragged`` would be the same exchange.
    """
    way = way_of(via)
    if devices == 1 or way is None:
        return devices == 1 and way is None
    if way.per_axis:
        return axes > 1
    return dropless or way.takes("fixed")


def transfers(
    via: str, rows: Rows, axes: tuple[str, ...], again: float, sliced: tuple[str, ...] = ()
) -> Iterator[Transfer]:
    """Yield the collectives of one sparse layer, forward and backward.

    Args:
      via: one of `VIAS`, or ``local``.
      rows: what is sent.
      axes: the mesh axes of the experts.
      again: how often the forward pass runs: 1, or 2 under rematerialisation.
      sliced: the mesh axes of the neurons, if their devices, which have the same tokens, send a
        part of each row instead of all of it; see `_sliced`.
    """
    both = again + 1
    tokens = rows.tokens * rows.row_bytes
    way = way_of(via)
    if way is None:
        return
    if way.exchanges_rows:
        slots: Slots = "fixed" if way.is_bounded or not rows.dropless else "ragged"
        op = way.to_experts.get(slots, "all_to_all")
        full = rows.rows * rows.factor(via) * rows.row_bytes
        parts = rows.tensor if sliced else 1
        for crossed in ((axis,) for axis in axes) if way.per_axis else (axes,):
            yield Transfer(op, crossed, full / parts, 2 * both, "rows to experts and back")
        if sliced:
            yield from _sliced(full, tokens, sliced, both)
    elif way.tokens_everywhere:
        back = way.back["ragged"]
        yield Transfer(back, axes, tokens, 2, "what the experts of each device say")
    else:
        full = tokens * rows.devices
        # The sum need not run again: nothing of it is kept.
        yield Transfer(way.to_experts["ragged"], axes, full, again + 1, "tokens to all experts")
        yield Transfer(way.back["ragged"], axes, full, 2, "sums to their tokens")


def _sliced(
    rows_bytes: float, token_bytes: float, axes: tuple[str, ...], times: float
) -> Iterator[Transfer]:
    """Yield what puts parts of rows together where the experts are, and takes sums apart again.

    The rows are gathered; the sums over neurons are reduce-scattered, go back in parts, and are
    gathered as tokens when they have been combined (mesh-tensorflow's ``d_model_split``).
    """
    yield Transfer("all_gather", axes, rows_bytes, times, "parts of rows")
    yield Transfer("reduce_scatter", axes, rows_bytes, times, "sums of rows")
    yield Transfer("all_gather", axes, token_bytes, times, "parts of tokens")
