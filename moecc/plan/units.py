"""Units of rematerialisation: what ``roll-layers`` makes one body of, and what is a loop in it.

A unit is the shortest run of layers that a stack repeats: one layer, or four of which the last is
sparse.  Layers of a unit that are alike and follow one another are a loop within it.  Where each of
them is a checkpoint of its own, they run once more than the others of the unit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from moecc.ir.graph import Graph, Node, Value
from moecc.plan.shapes import Shape

LAYER = re.compile(r"^(.*?\.?layers\.)(\d+)(?:\.(.*))?$")
"""A location in a layer: the stack, the number of the layer, the sublayer."""


@dataclass(frozen=True)
class Unit:
    """A unit.

    Attributes:
      looped: for each of its layers whether it is one of a loop.
    """

    looped: tuple[bool, ...]

    @property
    def size(self) -> int:
        """How many layers it has."""
        return len(self.looped)

    @property
    def as_whole(self) -> Unit:
        """The unit where layers of its loops are no checkpoints."""
        return Unit((False,) * self.size)


def layer_of(loc: str) -> str:
    """Return the layer that a location belongs to, or the location where it is in none."""
    match = LAYER.match(loc)
    return f"{match[1]}{match[2]}" if match else loc


def stack_of(of: Value | Node) -> str | None:
    """Return the stack that a node belongs to, or that the node that makes a value does."""
    node = of if isinstance(of, Node) else of.node
    match = LAYER.match(node.loc) if node is not None else None
    return match[1] if match else None


def units_of(graph: Graph, shape: Callable[[Value], Shape]) -> dict[str, Unit]:
    """Return the unit of each stack."""
    layers: dict[str, dict[int, list[Node]]] = {}
    for node in graph:
        match = LAYER.match(node.loc)
        if match:
            layers.setdefault(match[1], {}).setdefault(int(match[2]), []).append(node)
    return {
        stack: _unit([_look(numbered[i], shape) for i in sorted(numbered)])
        for stack, numbered in layers.items()
    }


def _look(nodes: Sequence[Node], shape: Callable[[Value], Shape]) -> tuple[object, ...]:
    return tuple((n.op.name, *map(shape, n.results)) for n in nodes)


def _unit(looks: Sequence[object]) -> Unit:
    runs = [list(group) for _, group in groupby(looks[: _period(looks)])]
    several = len(runs) > 1
    return Unit(tuple(several and len(run) > 1 for run in runs for _ in run))


def _period(items: Sequence[object]) -> int:
    """Return the length of the shortest run that `items` repeat, 1 where they repeat none."""
    count = len(items)
    for length in range(1, count // 2 + 1):
        if count % length == 0 and all(items[i] == items[i % length] for i in range(count)):
            return length
    return 1


def times_again(number: int, unit: Unit, own: bool, onward: bool) -> int:
    """Return how often a node runs again.

    Args:
      number: of its layer in the unit.
      unit: the unit.
      own: whether its own layer needs it to be differentiated.
      onward: whether it leads to what the layers behind its own take.
    """
    if unit.looped[number]:
        return own + onward
    return int(own or (onward and number + 1 < unit.size))
