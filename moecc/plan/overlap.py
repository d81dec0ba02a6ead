"""Which collectives a compiled program has beside products, as far as a plan can say.

A compiler decides it when it schedules.  It is foreseen here for those whose schedules were read
(`moecc compile` reads that of every program): there the parameters of a layer are gathered while
the products before them run, and gradients reduced while those behind them do.  Whatever layers
wait for is exposed, and so is what stands outside of the loops over layers.
"""

from __future__ import annotations

from collections.abc import Iterable

from moecc.plan.collectives import Transfer
from moecc.plan.machines import Machine

OVERLAPPING = ("tpu:v5p", "gpu")
"""Machines whose compilers were seen to do so, by the beginning of their names; XLA for CPUs and
for other TPUs has collectives that are waited for."""


def overlap(
    machine: Machine, moved: Iterable[tuple[Transfer, float, bool]]
) -> dict[str, dict[str, float]]:
    """Return by operation the ``overlapped_bytes`` of full tensors, and the ``exposed_bytes``.

    Args:
      machine: where.
      moved: collectives, the bytes of all their runs, and whether they are within a layer.
    """
    does = (machine.compiled_as or machine.name).startswith(OVERLAPPING)
    found: dict[str, dict[str, float]] = {}
    for transfer, size, in_layer in moved:
        row = found.setdefault(transfer.op, {"overlapped_bytes": 0.0, "exposed_bytes": 0.0})
        hidden = does and in_layer and not transfer.waits
        row["overlapped_bytes" if hidden else "exposed_bytes"] += size
    return found
