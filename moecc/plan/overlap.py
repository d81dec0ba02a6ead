"""The collectives that a compiled program runs beside products, as far as a plan can say.

A compiler decides it when it schedules.  It is foreseen here for those whose schedules were read
(`moecc compile` reads that of every program).  A turn of a loop over layers is products one after
the other.  A gather of parameters can run beside a product that stands before the one that reads
them, and gradients are reduced beside products that nothing waits for, those of other weights.
Collectives that layers wait for are exposed, and so are those outside of the loops: embedding and
head, and gradients of parameters that are stored whole, which are added up first.

* TPUs have a gather in a product of XLA's own, see below.
* XLA for GPUs begins the gathers of all first products together (queries, keys and values), and so
  again after an exchange, beside which it runs no other move.  Of an exchange in chunks all
  but the first are beside the products of another chunk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from moecc.plan.collectives import Collective
from moecc.plan.machines import efficiency
from moecc.plan.time import Estimate, PartCost, WeightProduct

OVERLAPPING = ("gpu",)
"""Machines whose compilers overlap by themselves, by the beginning of their names; XLA for CPUs and
TPUs has collectives that are waited for."""

ASKED = ("tpu:v5p",)
"""Machines whose compilers overlap if they are asked to."""


def overlap(estimate: Estimate, is_asked: bool) -> dict[str, dict[str, float]]:
    """Return by operation the ``overlapped_bytes`` of full tensors, and the ``exposed_bytes``.

    Args:
      estimate: of a step.
      is_asked: whether the compiler is asked to have collectives beside products.
    """
    machine = estimate.machine
    name = machine.compiled_as or machine.name
    overlaps = name.startswith((*OVERLAPPING, *(ASKED if is_asked else ())))
    shares_of = shares_on_gpu if machine.kind == "gpu" else shares_on_tpu
    layers: dict[str, list[PartCost]] = {}
    for part in estimate.parts:
        layers.setdefault(part.name.rpartition(".")[0], []).append(part)
    rows: dict[str, dict[str, float]] = {}
    for layer in layers.values():
        for part, shares in zip(layer, shares_of(layer), strict=True):
            for move, share in zip(part.collectives, shares, strict=True):
                size = part.count * move.times * move.tensor_bytes
                hidden = size * share if overlaps and part.in_layer else 0.0
                row = rows.setdefault(move.op, {"overlapped_bytes": 0.0, "exposed_bytes": 0.0})
                row["overlapped_bytes"] += hidden
                row["exposed_bytes"] += size - hidden
    return rows


def shares_on_gpu(layer: Sequence[PartCost]) -> Iterator[list[float]]:
    """Yield for each part the share of each collective that is beside products, in a loop."""
    begins = True
    for part in layer:
        exchanges = [each for each in part.collectives if each.op.endswith("all_to_all")]
        gathers = [each for each in part.collectives if is_gather(each)]
        # The last product of a part, of results or back to the model's width, has others before it.
        first = {id(each) for each in gathers[:-1]} if begins or exchanges else set()
        in_chunks = 1 - 1 / part.chunks
        yield [
            in_chunks
            if each in exchanges
            else float(id(each) not in first and not is_awaited(each))
            for each in part.collectives
        ]
        begins = begins and not gathers


def is_gather(move: Collective) -> bool:
    """Whether it gathers a parameter."""
    return move.op == "all_gather" and not move.waits


def is_reduction(move: Collective) -> bool:
    """Whether it reduces the gradient of a parameter, in a loop over layers."""
    return move.op == "reduce_scatter" and not move.waits


def is_awaited(move: Collective) -> bool:
    """Whether layers wait for it, or it runs behind their loop."""
    return move.waits or move.op == "all_reduce"


# XLA for TPUs schedules a turn of a loop over layers from its end (latency hiding).  One gather is
# on its way at a time: it ends before the product that reads it, begins where the next one,
# towards the beginning of the turn, has to end, and is fused with a product between, if there is
# one.  So it has the last of the products before its reader that has no gather yet.  A reduction
# of gradients is for the cores that a chip has for embeddings, which do one at a time: nothing in
# the turn waits for it, so it goes to the end, beside products that nothing waits for either, as
# many as last as long.  Those are the gradients of the layer's input; and the gradient of a
# weight, once its own reduction has a place behind it.
#
# The reductions with the longest chains of transfers before them are the last; of equal chains the
# largest.
#
# Products of experts without a capacity are kernels, and the gradients of their parameters loops
# over rows.  XLA does not see inside of a kernel, and fuses no gather with it.  Rounds of an
# exchange are one loop for all experts and products, before which all their parameters have to be
# there, and beside which nothing is reduced.  Other kernels follow on one another: each ends the
# gather of its parameter, so that the one behind it is on its way beside a kernel, and exposed.
# Where they are computed again, parameters are copied, too, for the transposed products, which
# does not wait for tokens: where these are gathered for longer than a parameter, it is copied
# before they are there, and its kernel ends no gather.  The gradient that the loop of one expert
# makes is copied before it is reduced, for as long as another is reduced; a loop for each of
# several experts leaves nothing to copy, and the next gradient is reduced beside it.


def exposed_gathers(
    products: Sequence[WeightProduct],
    gathered: Collection[str],
    early: Collection[str] = (),
    others: Iterable[str] = (),
) -> set[str]:
    """Return the parameters that are gathered beside no product.

    Args:
      products: of a turn, forward, in order.
      gathered: the parameters that are gathered.
      early: those that have to be there before the values that the kernels that read them wait for.
      others: other gathers, which have to end before any kernel.
    """
    waiting, exposed = deque[str](), set[str]()
    for product in reversed(products):
        is_gathered = product.weight in gathered
        if product.kernel is None:
            waiting.extend(others)
            others = ()
            if waiting:
                waiting.popleft()
        elif waiting and is_gathered and not (product.kernel.in_rounds or product.weight in early):
            exposed.add(waiting.popleft())
        if is_gathered:
            waiting.append(product.weight)
    return exposed.union(waiting, others)


def exposed_gradients(
    products: Sequence[WeightProduct], seconds: Mapping[str, float], begins: int
) -> set[str]:
    """Return the parameters whose gradients are reduced beside no product.

    Args:
      products: of a turn, forward, in order.
      seconds: of the reduction of each gradient, the last of a turn first.
      begins: how many products read the input of the first, before all others.
    """
    free = deque(product.seconds for product in reversed(products[:begins]))
    by_weight = {product.weight: product for product in products}
    exposed = set[str]()
    for product in (by_weight[weight] for weight in seconds if weight in by_weight):
        if not free:
            exposed.add(product.weight)
        left = seconds[product.weight]
        while free and left > 0:
            left -= free.popleft()
        if product.kernel is None or (product.kernel.experts > 1 and not product.kernel.in_rounds):
            free.append(product.seconds)
    return exposed


def shares_on_tpu(layer: Sequence[PartCost]) -> Iterator[list[float]]:
    """Yield for each part the share of each collective that is beside products, in a loop.

    A turn backward begins with the gradient of the layer's output: gathers of it wait for nothing,
    and take part as the gathers of parameters do.  Sums that the layer waits for are reduced beside
    products that need not wait for them.
    """
    each = [move for part in layer for move in part.collectives]
    gathered = {move.weight: move.tensor_bytes for move in each if is_gather(move)}
    reductions = {move.weight: move.times for move in each if is_reduction(move)}
    products, _ = _in_order(layer, gathered)
    early = [name for part in layer for name in _early(part)]
    last = layer[-1].collectives
    begins = [move.why for move in last if move.op == "all_gather" and move.leaves_work]
    forward = exposed_gathers(products, gathered)
    again = exposed_gathers(products, gathered, early, begins)
    reduced = set(_reduced_alone(layer, gathered))

    def share(move: Collective) -> float:
        if is_gather(move):
            backward = reductions.get(move.weight, 0.0) / move.times
            return (1 - backward) * (move.weight not in forward) + backward * (
                move.weight not in again
            )
        if move.op == "all_gather":
            return float(move.leaves_work and move.why in begins and move.why not in again)
        return float(move.leaves_work or not (is_awaited(move) or move.weight in reduced))

    for part in layer:
        yield [share(move) for move in part.collectives]


def _early(part: PartCost) -> Iterator[str]:
    """Yield the parameters whose gathers move less than those of values that the part waits for."""
    each = part.collectives
    awaited = (moved.tensor_bytes for moved in each if moved.op == "all_gather" and moved.waits)
    most = max(awaited, default=0.0)
    yield from (moved.weight for moved in each if is_gather(moved) and moved.tensor_bytes < most)


def _reduced_alone(layer: Sequence[PartCost], gathered: Mapping[str, float]) -> Iterator[str]:
    """Yield the parameters whose gradients are reduced beside no product.

    One after the other is reduced, and the one at the end of the longest chain is the last.
    Reductions before sums of a part have none of the products behind these.
    """
    # The chain of a reduction: the bytes of full tensors that it reduces, and of all sums that it
    # waits for.  XLA prices a collective by these, whatever links it has, and links at full rate.
    chains: list[tuple[float, Collective, int]] = []
    waits, ideal = 0.0, efficiency("network")
    for number, part in reversed(list(enumerate(layer))):
        chains += [(waits + c.tensor_bytes, c, number) for c in part.collectives if is_reduction(c)]
        for moved in part.collectives:
            if moved.op == "reduce_scatter" and moved.leaves_work:
                waits += moved.tensor_bytes
                chains.append((waits, moved, number))
    stretches: dict[int, dict[str, float]] = {0: {}}
    first = 0
    for _, moved, number in sorted(chains, key=lambda chain: -chain[0]):
        if moved.weight:
            stretches[first][moved.weight] = moved.seconds * ideal / moved.times
        else:
            first = number
            stretches.setdefault(first, {})
    for first, seconds in stretches.items():
        products, begins = _in_order(layer[first:], gathered)
        yield from exposed_gradients(products, seconds, begins)


def _in_order(
    parts: Sequence[PartCost], gathered: Mapping[str, float]
) -> tuple[list[WeightProduct], int]:
    """Return the products of `parts`, forward, and how many read the input of the first."""
    by_part = [tuple(part.products()) for part in parts]
    first = next(filter(None, by_part), ())
    # Products of the same input can be in any order: the smallest parameter comes first.
    products = sorted((p for p in first if p.is_first), key=lambda p: gathered.get(p.weight, 0.0))
    begins = len(products)
    return [*products, *(p for each in by_part for p in each if p not in products)], begins
