"""Which gathers and reductions of a turn of a loop over layers find a product on a TPU.

XLA schedules a turn from its end (latency hiding).  A gather is fused with one of the products
before the one that reads it, the last that has no gather yet.  A reduction of gradients is for the
cores that a chip has for embeddings, which do one at a time: nothing in the turn waits for it, so
the longest goes to the end, beside products that nothing waits for either, as many as last as long.
Those are the gradients of the layer's input; and the gradient of a weight, once its own reduction
has a place behind it.

Products of experts without a capacity are kernels and loops over rows.  A kernel takes no gather,
as XLA does not see inside; nothing is reduced beside such a loop, and rounds of an exchange are
one loop for all of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from moecc.ir.graph import Value
from moecc.ir.traits import Cost
from moecc.plan.parts import Part, Step


@dataclass(frozen=True)
class Product:
    """A product with a parameter, forward.

    Attributes:
      weight: the parameter.
      seconds: what it takes; the gradients of both operands take as long each.
      is_first: whether no other product of its part is before it.
      is_kernel: whether it is a kernel, as are the products of groups of rows, and the gradient
        of its parameter a loop over the rows.
    """

    weight: str
    seconds: float
    is_first: bool
    is_kernel: bool = False


def products_of(part: Part, seconds: Callable[[Step], float], ragged: bool) -> Iterator[Product]:
    """Yield the products of a part with its parameters, in order.

    Args:
      part: the part.
      seconds: of a step, forward.
      ragged: whether experts have unequal numbers of rows, which makes their products kernels.
    """
    behind = set[Value]()
    for node, step in zip(part.nodes, part.steps, strict=True):
        is_behind = not behind.isdisjoint(node.operands)
        weight = next(filter(None, step.weights), None)
        if weight is not None and step.cost is Cost.PRODUCT:
            is_behind, is_first = True, not is_behind
            yield Product(weight.name, seconds(step), is_first, ragged and weight.of_experts)
        if is_behind:
            behind.update(node.results)


def exposed_gathers(products: Sequence[Product], gathered: Collection[str]) -> set[str]:
    """Return the parameters whose gathers are beside no product.

    Args:
      products: of a turn, forward, in order.
      gathered: the parameters that are gathered.
    """
    waiting: deque[str] = deque()
    for product in reversed(products):
        if waiting and not product.is_kernel:
            waiting.popleft()
        if product.weight in gathered:
            waiting.append(product.weight)
    return set(waiting)


def exposed_gradients(
    products: Sequence[Product], seconds: Mapping[str, float], begins: int
) -> set[str]:
    """Return the parameters whose gradients are reduced beside no product.

    Args:
      products: of a turn, forward, in order.
      seconds: of the reduction of each gradient.
      begins: how many products read the input of the layer.
    """
    free = deque(product.seconds for product in reversed(products[:begins]))
    exposed = set[str]()
    reduced = [product for product in products if product.weight in seconds]
    for product in sorted(reduced, key=lambda p: -seconds[p.weight]):
        if not free:
            exposed.add(product.weight)
        left = seconds[product.weight]
        while free and left > 0:
            left -= free.popleft()
        if not product.is_kernel:
            free.append(product.seconds)
    return exposed
