"""Which collectives a compiled program has beside products, as far as a plan can say.

A compiler decides it when it schedules.  It is foreseen here for those whose schedules were read
(`moecc compile` reads that of every program).  A turn of a loop over layers is products one after
the other.  A gather of parameters can run beside a product that stands before the one that reads
them, and gradients are reduced beside products that nothing waits for, those of other weights.
What layers wait for is exposed, and so is what stands outside of the loops: embedding and head, and
gradients of parameters that are stored whole, which are added up first.

* TPUs have a gather in a product of XLA's own (`moecc.plan.overlap_tpu`).
* XLA for GPUs begins the gathers of all first products together (queries, keys and values), and so
  again after an exchange, beside which it runs no other collective.  Of an exchange in chunks all
  but the first are beside the products of another chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from moecc.plan.machines import Machine
from moecc.plan.overlap_tpu import shares_on_tpu
from moecc.plan.part_transfers import PartTransfers, is_awaited, is_gather

OVERLAPPING = ("gpu",)
"""Machines whose compilers do so by themselves, by the beginning of their names; XLA for CPUs and
TPUs has collectives that are waited for."""

ASKED = ("tpu:v5p",)
"""Machines whose compilers do so if they are asked to."""


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
    shares = _on_gpu if machine.kind == "gpu" else shares_on_tpu
    layers: dict[str, list[PartTransfers]] = {}
    for part in parts:
        layers.setdefault(part.layers, []).append(part)
    found: dict[str, dict[str, float]] = {}
    for layer in layers.values():
        for part, beside in zip(layer, shares(layer), strict=True):
            for transfer, share in zip(part.transfers, beside, strict=True):
                size = part.count * transfer.times * transfer.tensor_bytes
                hidden = size * share if does and part.in_layer else 0.0
                row = found.setdefault(transfer.op, {"overlapped_bytes": 0.0, "exposed_bytes": 0.0})
                row["overlapped_bytes"] += hidden
                row["exposed_bytes"] += size - hidden
    return found


def _on_gpu(layer: Sequence[PartTransfers]) -> Iterator[list[float]]:
    """Yield shares as `shares_on_tpu` does."""
    begins = True
    for part in layer:
        exchanges = [t for t in part.transfers if t.op.endswith("all_to_all")]
        gathers = [t for t in part.transfers if is_gather(t)]
        # The last product of a part, of results or back to the model's width, has others before it.
        first = {id(t) for t in gathers[:-1]} if begins or exchanges else set()
        in_chunks = 1 - 1 / part.chunks
        yield [
            in_chunks if t in exchanges else float(id(t) not in first and not is_awaited(t))
            for t in part.transfers
        ]
        begins = begins and not gathers
