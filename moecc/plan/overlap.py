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

OVERLAPPING = ("gpu",)
"""Machines whose compilers do so by themselves, by the beginning of their names; XLA for CPUs and
TPUs has collectives that are waited for."""

ASKED = ("tpu:v5p",)
"""Machines whose compilers do so if they are asked to."""


def overlap(
    machine: Machine, moved: Iterable[tuple[Transfer, float, bool, int]], is_asked: bool
) -> dict[str, dict[str, float]]:
    """Return by operation the ``overlapped_bytes`` of full tensors, and the ``exposed_bytes``.

    Args:
      machine: where.
      moved: collectives, the bytes of all their runs, whether they are within a layer, and how many
        devices take part.
      is_asked: whether the compiler is asked to have them beside products.
    """
    name = machine.compiled_as or machine.name
    does = name.startswith((*OVERLAPPING, *(ASKED if is_asked else ())))
    found: dict[str, dict[str, float]] = {}
    for transfer, size, in_layer, devices in moved:
        row = found.setdefault(transfer.op, {"overlapped_bytes": 0.0, "exposed_bytes": 0.0})
        # Over all devices a TPU gathers and reduces by all-reduces, which have no parts.
        in_parts = machine.kind != "tpu" or devices < machine.devices
        hidden = does and in_layer and in_parts and not transfer.waits
        row["overlapped_bytes" if hidden else "exposed_bytes"] += size
    return found
