"""Which collectives a compiled program has beside products, as far as a plan can say.

A compiler decides it when it schedules.  It is foreseen here for those whose schedules were read
(`moecc compile` reads that of every program).  A turn of a loop over layers is products one after
the other.  A gather of parameters can run beside the product before the one that reads them, and
gradients are reduced beside products that nothing waits for, those of other weights.  What layers
wait for is exposed, and so is what stands outside of the loops: embedding and head, and gradients
of parameters that are stored whole, which are added up first.

* The first product of a turn has none before it.  TPUs take the smallest parameter first.
* XLA for GPUs begins the gathers of all first products together (queries, keys and values), and so
  again after an exchange, beside which it runs no other collective.  Of an exchange in chunks all
  but the first are beside the products of another chunk.
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
      chunks: in how many parts rows are exchanged.
    """

    layers: str
    count: int
    in_layer: bool
    transfers: Sequence[Transfer]
    chunks: int = 1


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
    shares = _on_gpu if machine.kind == "gpu" else _on_tpu
    found: dict[str, dict[str, float]] = {}
    begun = set[str]()
    for part in parts:
        beside = shares(part, part.layers not in begun)
        if any(map(_is_gather, part.transfers)):
            begun.add(part.layers)
        for transfer, share in zip(part.transfers, beside, strict=True):
            size = part.count * transfer.times * transfer.tensor_bytes
            hidden = size * share if does and part.in_layer else 0.0
            row = found.setdefault(transfer.op, {"overlapped_bytes": 0.0, "exposed_bytes": 0.0})
            row["overlapped_bytes"] += hidden
            row["exposed_bytes"] += size - hidden
    return found


def _on_tpu(part: PartTransfers, begins: bool) -> list[float]:
    """Return the share of each transfer that is beside products, if the part is of layers.

    Args:
      part: the part.
      begins: whether its products are the first of a layer.
    """
    gathers = [t for t in part.transfers if _is_gather(t)]
    first = min(gathers, key=lambda t: t.tensor_bytes, default=None) if begins else None
    return [float(t is not first and not _is_awaited(t)) for t in part.transfers]


def _on_gpu(part: PartTransfers, begins: bool) -> list[float]:
    """Return the shares as `_on_tpu` does."""
    exchanges = [t for t in part.transfers if t.op.endswith("all_to_all")]
    gathers = [t for t in part.transfers if _is_gather(t)]
    # The last product of a part, of results or back to the model's width, has others before it.
    first = {id(t) for t in gathers[:-1]} if begins or exchanges else set()
    in_chunks = 1 - 1 / part.chunks
    return [
        in_chunks if t in exchanges else float(id(t) not in first and not _is_awaited(t))
        for t in part.transfers
    ]


def _is_gather(transfer: Transfer) -> bool:
    return transfer.op == "all_gather" and not transfer.waits


def _is_awaited(transfer: Transfer) -> bool:
    """Whether layers wait for it, or it is done behind their loop."""
    return transfer.waits or transfer.op == "all_reduce"
