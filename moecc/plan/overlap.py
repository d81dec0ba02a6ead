"""Which collectives a compiled program has beside products, as far as a plan can say.

A compiler decides it when it schedules.  It is foreseen here for those whose schedules were read
(`moecc compile` reads that of every program).  A turn of a loop over layers is products one after
the other.  The parameters of each are gathered while the product before it runs, so that only the
first gather of a turn has none beside it; gradients are reduced while the products behind them run,
and those of the last while the turn goes on.  What layers wait for is exposed, and so is what
stands outside of the loops.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moecc.plan.collectives import Transfer
from moecc.plan.machines import Machine

OVERLAPPING = ("gpu",)
"""Machines whose compilers do so by themselves, by the beginning of their names; XLA for CPUs and
TPUs has collectives that are waited for."""

ASKED = ("tpu:v5p",)
"""Machines whose compilers do so if they are asked to."""


@dataclass(frozen=True)
class PartTransfers:
    """The collectives of equal parts of a model.

    Attributes:
      layers: of which layers they are parts: those that have one name are in one loop.
      count: how many there are.
      in_layer: whether they are parts of layers.
      transfers: of one part.
    """

    layers: str
    count: int
    in_layer: bool
    transfers: Sequence[Transfer]


def overlap(
    machine: Machine, parts: Iterable[PartTransfers], is_asked: bool
) -> dict[str, dict[str, float]]:
    """Return by operation the ``overlapped_bytes`` of full tensors, and the ``exposed_bytes``.

    Args:
      machine: where.
      parts: of the model, those of a layer in the order in which they run.
      is_asked: whether the compiler is asked to have them beside products.
    """
    name = machine.compiled_as or machine.name
    does = name.startswith((*OVERLAPPING, *(ASKED if is_asked else ())))
    found: dict[str, dict[str, float]] = {}
    begun = set[str]()
    for part in parts:
        first = None if part.layers in begun else _first_gather(part)
        begun.update([part.layers] if first else [])
        for transfer in part.transfers:
            hidden = does and part.in_layer and not transfer.waits and transfer is not first
            row = found.setdefault(transfer.op, {"overlapped_bytes": 0.0, "exposed_bytes": 0.0})
            size = part.count * transfer.times * transfer.tensor_bytes
            row["overlapped_bytes" if hidden else "exposed_bytes"] += size
    return found


def _first_gather(part: PartTransfers) -> Transfer | None:
    """Return the gather that no product stands before: compilers take the smallest."""
    gathers = [t for t in part.transfers if t.op == "all_gather" and not t.waits]
    return min(gathers, key=lambda t: t.tensor_bytes, default=None)
