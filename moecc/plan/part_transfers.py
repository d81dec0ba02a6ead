"""The collectives of equal parts of a model, as a compiler schedules them, and their kinds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moecc.plan.collectives import Transfer
from moecc.plan.turns import Product


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


def is_gather(transfer: Transfer) -> bool:
    """Whether it gathers a parameter."""
    return transfer.op == "all_gather" and not transfer.waits


def is_reduction(transfer: Transfer) -> bool:
    """Whether it reduces the gradient of a parameter, in a loop over layers."""
    return transfer.op == "reduce_scatter" and not transfer.waits


def is_awaited(transfer: Transfer) -> bool:
    """Whether layers wait for it, or it is done behind their loop."""
    return transfer.waits or transfer.op == "all_reduce"
