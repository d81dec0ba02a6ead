"""Bytes and seconds of a collective.

Bytes are what each device sends to others, by the algorithm that sends the least: rings for gathers
and reductions, a message to each peer for exchanges.  ``tensor_bytes`` is how compiled programs are
counted: the size of the full tensor, of an exchange that of one device's rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moecc.ir.graph import Value
from moecc.ir.traits import Cost
from moecc.plan.machines import Machine
from moecc.plan.networks import Route
from moecc.plan.parts import Part, Step


def sent_bytes(op: str, devices: int, tensor_bytes: float) -> float:
    """Return the bytes that one device sends.

    Args:
      op: a collective that sends something.
      devices: how many take part.
      tensor_bytes: the gathered result of an all-gather, the operand of a reduce-scatter or
        all-reduce, the rows of one device for an exchange; the rows are spread evenly.

    An all-gather passes every part but one on, (n − 1)/n of the result, and a reduce-scatter is the
    same backwards; an all-reduce is both.  An exchange keeps its own part.
    """
    share = (devices - 1) / devices
    return tensor_bytes * share * (2 if op == "all_reduce" else 1)


def rows_sent(counts: Sequence[Sequence[int]], row_bytes: float) -> list[float]:
    """Return the bytes that each device sends in an exchange whose numbers of rows are known.

    Args:
      counts: for each device, how many of its rows go to each device, itself included.
      row_bytes: of one row.
    """
    return [row_bytes * (sum(row) - row[i]) for i, row in enumerate(counts)]


def seconds(op: str, route: Route, tensor_bytes: float) -> float:
    """Return the seconds of a collective on ideal links; arguments as for `sent_bytes`."""
    if op.endswith("all_to_all"):
        return route.all_to_all(tensor_bytes)
    return route.all_gather(tensor_bytes) * (2 if op == "all_reduce" else 1)


class Transfer(NamedTuple):
    """A collective of a step.

    Attributes:
      op: a collective that sends something.
      axes: the mesh axes that it runs over.
      tensor_bytes: of one, see `sent_bytes`.
      times: how often a step does it, in one part.
      why: what for, in a few words.
      waits: whether computation has to wait for it; parameters and their gradients do not.
      odd: whether it gathers shards with odd numbers of rows.
      weight: the parameter that it gathers, or whose gradient it sums.
      leaves_work: of one that computation waits for, whether its layer has products that do not.
    """

    op: str
    axes: tuple[str, ...]
    tensor_bytes: float
    times: float
    why: str
    waits: bool = True
    odd: bool = False
    weight: str = ""
    leaves_work: bool = False

    def on(self, kind: str) -> Transfer:
        """Return what a machine of `kind` makes of it.

        XLA puts odd numbers of rows together on a TPU by a sum of arrays that are zero but for a
        shard.
        """
        return self._replace(op="all_reduce") if self.odd and kind == "tpu" else self


# Which gathers and reductions of a turn of a loop over layers find a product on a TPU.
#
# XLA schedules a turn from its end (latency hiding).  One gather is on its way at a time: it ends
# before the product that reads it, begins where the next one, towards the beginning of the turn,
# has
# to end, and is fused with a product between, if there is one.  So it has the last of the
# products
# before its reader that has no gather yet.  A reduction of gradients is for the cores that a chip
# has
# for embeddings, which do one at a time: nothing in the turn waits for it, so it goes to the end,
# beside products that nothing waits for either, as many as last as long.  Those are the gradients
# of
# the layer's input; and the gradient of a weight, once its own reduction has a place behind it.
#
# What waits for the longest chain of transfers is the last.  So of the reductions the largest
# are, if
# all wait for the same.
#
# Products of experts without a capacity are kernels, and the gradients of their parameters loops
# over
# rows.  XLA does not see inside of a kernel, and fuses no gather with it.  Rounds of an exchange
# are
# one loop for all experts and products, before which all their parameters have to be there, and
# beside which nothing is reduced.  Other kernels follow on one another: each ends the gather of
# its
# parameter, so that the one behind it is on its way beside a kernel, and exposed.  Where they are
# computed again, parameters are copied, too, for the transposed products, which does not wait for
# tokens: where these are gathered for longer than a parameter, it is copied before they are
# there,
# and its kernel ends no gather.  The gradient that the loop of one expert makes is copied before
# it
# is reduced, for as long as another is reduced; a loop for each of several experts leaves nothing
# to
# copy, and the next gradient is reduced beside it.


class Kernel(NamedTuple):
    """A product of groups of rows, one for each expert of a device.

    Attributes:
      in_rounds: whether it is in the loop of the rounds of an exchange.
      experts: how many a device has.
    """

    in_rounds: bool
    experts: int

    @property
    def leaves_loop(self) -> bool:
        """Whether another gradient is reduced beside the loop that makes that of its parameter."""
        return self.experts > 1 and not self.in_rounds


@dataclass(frozen=True)
class Product:
    """A product with a parameter, forward.

    Attributes:
      weight: the parameter.
      seconds: what it takes; the gradients of both operands take as long each.
      is_first: whether no other product of its part is before it.
      kernel: what it is, if it is a kernel.
    """

    weight: str
    seconds: float
    is_first: bool
    kernel: Kernel | None = None


def products_of(
    part: Part, seconds: Callable[[Step], float], kernel: Kernel | None
) -> Iterator[Product]:
    """Yield the products of a part with its parameters, in order.

    Args:
      part: the part.
      seconds: of a step, forward.
      kernel: what products of experts are that have unequal numbers of rows.
    """
    behind = set[Value]()
    for node, step in zip(part.nodes, part.steps, strict=True):
        is_behind = not behind.isdisjoint(node.operands)
        weight = next(filter(None, step.weights), None)
        if weight is not None and step.cost is Cost.PRODUCT:
            is_behind, is_first = True, not is_behind
            of_rows = kernel if weight.of_experts else None
            yield Product(weight.name, seconds(step), is_first, of_rows)
        if is_behind:
            behind.update(node.results)


def exposed_gathers(
    products: Sequence[Product],
    gathered: Collection[str],
    early: Collection[str] = (),
    others: Iterable[str] = (),
) -> set[str]:
    """Return what is gathered beside no product.

    Args:
      products: of a turn, forward, in order.
      gathered: the parameters that are gathered.
      early: those that have to be there before what the kernels that read them wait for.
      others: what else is gathered, and has to be there before any kernel.
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
    products: Sequence[Product], seconds: Mapping[str, float], begins: int
) -> set[str]:
    """Return the parameters whose gradients are reduced beside no product.

    Args:
      products: of a turn, forward, in order.
      seconds: of the reduction of each gradient, the last of a turn first.
      begins: how many products read what the first reads, before all others.
    """
    free = deque(product.seconds for product in reversed(products[:begins]))
    of = {product.weight: product for product in products}
    exposed = set[str]()
    for product in (of[weight] for weight in seconds if weight in of):
        if not free:
            exposed.add(product.weight)
        left = seconds[product.weight]
        while free and left > 0:
            left -= free.popleft()
        if product.kernel is None or product.kernel.leaves_loop:
            free.append(product.seconds)
    return exposed


# The collectives of equal parts of a model, as a compiler schedules them, and their kinds.


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


# Which collectives of a layer run beside products on a TPU, forward and backward.
#
# A turn of the loop over layers has its gathers of parameters and reductions of gradients as
# `moecc.plan.collectives` says.  A turn backward begins with the gradient of what leaves the layer:
# what is
# gathered of that waits for nothing, and takes part as the gathers of parameters do.  Sums that
# the
# layer waits for are reduced beside what need not wait for them.


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


# Which collectives a compiled program has beside products, as far as a plan can say.
#
# A compiler decides it when it schedules.  It is foreseen here for those whose schedules were
# read
# (`moecc compile` reads that of every program).  A turn of a loop over layers is products one
# after
# the other.  A gather of parameters can run beside a product that stands before the one that
# reads
# them, and gradients are reduced beside products that nothing waits for, those of other weights.
# What layers wait for is exposed, and so is what stands outside of the loops: embedding and head,
# and
# gradients of parameters that are stored whole, which are added up first.
#
# * TPUs have a gather in a product of XLA's own (`moecc.plan.collectives`).
# * XLA for GPUs begins the gathers of all first products together (queries, keys and values), and
# so
#   again after an exchange, beside which it runs no other collective.  Of an exchange in chunks
# all
#   but the first are beside the products of another chunk.

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
