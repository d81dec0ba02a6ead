"""Which collectives a compiled program has beside products, as far as a plan can say.

A compiler decides it when it schedules.  It is foreseen here for those whose schedules were read
(`moecc compile` reads that of every program).  A turn of a loop over layers is products one after
the other.  A gather of parameters can run beside a product that stands before the one that reads
them, and gradients are reduced beside products that nothing waits for, those of other weights.
What layers wait for is exposed, and so is what stands outside of the loops: embedding and head, and
gradients of parameters that are stored whole, which are added up first.

* TPUs have a gather in a product of XLA's own (`moecc.plan.turns`).
* XLA for GPUs begins the gathers of all first products together (queries, keys and values), and so
  again after an exchange, beside which it runs no other collective.  Of an exchange in chunks all
  but the first are beside the products of another chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from moecc.plan.collectives import Transfer
from moecc.plan.machines import Machine
from moecc.plan.turns import Product, exposed_gathers, exposed_gradients

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
      seconds: what each transfer takes on ideal links, once.
      chunks: in how many parts rows are exchanged.
      products: of one part with its parameters, forward, in order.
    """

    layers: str
    count: int
    in_layer: bool
    transfers: Sequence[Transfer]
    seconds: Sequence[float]
    chunks: int = 1
    products: Sequence[Product] = ()


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


def _on_tpu(layer: Sequence[PartTransfers]) -> Iterator[list[float]]:
    """Yield for each part the share of each transfer that is beside products, in a loop."""
    gathers = {t.weight: t.tensor_bytes for part in layer for t in part.transfers if _is_gather(t)}
    gradients = {
        t.weight: seconds
        for part in layer
        for t, seconds in zip(part.transfers, part.seconds, strict=True)
        if t.op == "reduce_scatter" and not t.waits
    }
    first = next((part.products for part in layer if part.products), ())
    # What reads the layer's input can be in any order: the smallest parameter comes first.
    products = sorted((p for p in first if p.is_first), key=lambda p: gathers.get(p.weight, 0.0))
    begins = len(products)
    products += [p for part in layer for p in part.products if p not in products]
    late = exposed_gathers(products, gathers)
    left = exposed_gradients(products, gradients, begins)
    for part in layer:
        yield [
            float(not _is_awaited(t) and t.weight not in (late if _is_gather(t) else left))
            for t in part.transfers
        ]


def _on_gpu(layer: Sequence[PartTransfers]) -> Iterator[list[float]]:
    """Yield shares as `_on_tpu` does."""
    begins = True
    for part in layer:
        exchanges = [t for t in part.transfers if t.op.endswith("all_to_all")]
        gathers = [t for t in part.transfers if _is_gather(t)]
        # The last product of a part, of results or back to the model's width, has others before it.
        first = {id(t) for t in gathers[:-1]} if begins or exchanges else set()
        in_chunks = 1 - 1 / part.chunks
        yield [
            in_chunks if t in exchanges else float(id(t) not in first and not _is_awaited(t))
            for t in part.transfers
        ]
        begins = begins and not gathers


def _is_gather(transfer: Transfer) -> bool:
    return transfer.op == "all_gather" and not transfer.waits


def _is_awaited(transfer: Transfer) -> bool:
    """Whether layers wait for it, or it is done behind their loop."""
    return transfer.waits or transfer.op == "all_reduce"
