"""Which collectives of a layer run beside products on a TPU, forward and backward.

A turn of the loop over layers has its gathers of parameters and reductions of gradients as
`moecc.plan.turns` says.  A turn backward begins with the gradient of what leaves the layer: what is
gathered of that waits for nothing, and takes part as the gathers of parameters do.  Sums that the
layer waits for are reduced beside what need not wait for them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moecc.plan.collectives import Transfer
from moecc.plan.part_transfers import PartTransfers, is_awaited, is_gather, is_reduction
from moecc.plan.turns import Product, exposed_gathers, exposed_gradients


def shares_on_tpu(layer: Sequence[PartTransfers]) -> Iterator[list[float]]:
    """Yield for each part the share of each transfer that is beside products, in a loop."""
    turns = _turns(layer)
    for part in layer:
        yield [turns.share(t) for t in part.transfers]


@dataclass(frozen=True)
class _Turns:
    """What the turns of a layer have beside no product.

    Attributes:
      backward: how often the gradient of each parameter is reduced, once in a turn backward.
      forward: the parameters whose gathers are exposed forward.
      again: those whose gathers are backward, and what else is gathered.
      begins: what is gathered of gradients that turns backward begin with.
      reduced: the parameters whose gradients are reduced beside no product.
    """

    backward: Mapping[str, float]
    forward: Collection[str]
    again: Collection[str]
    begins: Collection[str]
    reduced: Collection[str]

    def share(self, one: Transfer) -> float:
        """Return which share of the runs of a transfer is beside a product."""
        if is_gather(one):
            back = self.backward.get(one.weight, 0.0) / one.times
            forward, again = one.weight not in self.forward, one.weight not in self.again
            return (1 - back) * forward + back * again
        if one.op == "all_gather":
            begins = one.leaves_work and one.why in self.begins
            return float(begins and one.why not in self.again)
        return float(one.leaves_work or not (is_awaited(one) or one.weight in self.reduced))


def _turns(layer: Sequence[PartTransfers]) -> _Turns:
    gathered = {t.weight: t.tensor_bytes for part in layer for t in part.transfers if is_gather(t)}
    products, _ = _in_order(layer, gathered)
    early = [name for part in layer for name in _early(part)]
    begins = [t.why for t in layer[-1].transfers if t.op == "all_gather" and t.leaves_work]
    return _Turns(
        {t.weight: t.times for part in layer for t in part.transfers if is_reduction(t)},
        exposed_gathers(products, gathered),
        exposed_gathers(products, gathered, early, begins),
        begins,
        set(_reduced_alone(layer, gathered)),
    )


def _early(part: PartTransfers) -> Iterator[str]:
    """Yield the parameters whose gathers move less than those of values that the part waits for."""
    awaited = (t.tensor_bytes for t in part.transfers if t.op == "all_gather" and t.waits)
    most = max(awaited, default=0.0)
    yield from (t.weight for t in part.transfers if is_gather(t) and t.tensor_bytes < most)


class _Reduction(NamedTuple):
    """The reduction of a gradient, or of sums that the layer waits for.

    Attributes:
      chain: the bytes of full tensors that it reduces, and of all sums that it waits for.  XLA
        prices a collective by these, whatever links it has.
      weight: the parameter whose gradient it is; empty: sums.
      seconds: what it takes.
      part: of which part, by number.
    """

    chain: float
    weight: str
    seconds: float
    part: int


def _reductions(layer: Sequence[PartTransfers]) -> Iterator[_Reduction]:
    """Yield all reductions of a turn backward; those of a part wait for sums of later parts."""
    waits = 0.0
    for number, part in reversed(list(enumerate(layer))):
        both = list(zip(part.transfers, part.seconds, strict=True))
        for one, each in both:
            if is_reduction(one):
                yield _Reduction(waits + one.tensor_bytes, one.weight, each, number)
        for one, each in both:
            if one.op == "reduce_scatter" and one.leaves_work:
                waits += one.tensor_bytes
                yield _Reduction(waits, "", each, number)


def _reduced_alone(layer: Sequence[PartTransfers], gathered: Mapping[str, float]) -> Iterator[str]:
    """Yield the parameters whose gradients are reduced beside no product.

    One after the other is reduced, and what is at the end of the longest chain is the last.  What
    is reduced before sums of a part has none of the products behind these.
    """
    stretches: dict[int, dict[str, float]] = {0: {}}
    first = 0
    for one in sorted(_reductions(layer), key=lambda one: -one.chain):
        if one.weight:
            stretches[first][one.weight] = one.seconds
        else:
            first = one.part
            stretches.setdefault(first, {})
    for first, seconds in stretches.items():
        products, begins = _in_order(layer[first:], gathered)
        yield from exposed_gradients(products, seconds, begins)


def _in_order(
    parts: Sequence[PartTransfers], gathered: Mapping[str, float]
) -> tuple[list[Product], int]:
    """Return the products of `parts`, forward, and how many of them read what the first reads."""
    first = next((part.products for part in parts if part.products), ())
    # What reads the same input can be in any order: the smallest parameter comes first.
    products = sorted((p for p in first if p.is_first), key=lambda p: gathered.get(p.weight, 0.0))
    begins = len(products)
    return [*products, *(p for x in parts for p in x.products if p not in products)], begins
