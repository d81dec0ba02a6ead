"""Which gathers and reductions of a turn of a loop over layers find a product on a TPU.

XLA schedules a turn from its end (latency hiding).  One gather is on its way at a time: it ends
before the product that reads it, begins where the next one, towards the beginning of the turn, has
to end, and is fused with a product between, if there is one.  So it has the last of the products
before its reader that has no gather yet.  A reduction of gradients is for the cores that a chip has
for embeddings, which do one at a time: nothing in the turn waits for it, so it goes to the end,
beside products that nothing waits for either, as many as last as long.  Those are the gradients of
the layer's input; and the gradient of a weight, once its own reduction has a place behind it.

What waits for the longest chain of transfers is the last.  So of the reductions the largest are, if
all wait for the same.

Products of experts without a capacity are kernels, and the gradients of their parameters loops over
rows.  XLA does not see inside of a kernel, and fuses no gather with it.  Rounds of an exchange are
one loop for all experts and products, before which all their parameters have to be there, and
beside which nothing is reduced.  Other kernels follow on one another: each ends the gather of its
parameter, so that the one behind it is on its way beside a kernel, and exposed.  Where they are
computed again, parameters are copied, too, for the transposed products, which does not wait for
tokens: where these are gathered for longer than a parameter, it is copied before they are there,
and its kernel ends no gather.  The gradient that the loop of one expert makes is copied before it
is reduced, for as long as another is reduced; a loop for each of several experts leaves nothing to
copy, and the next gradient is reduced beside it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moecc.ir.graph import Value
from moecc.ir.traits import Cost
from moecc.plan.parts import Part, Step


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
