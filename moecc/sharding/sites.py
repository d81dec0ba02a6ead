"""What propagation reads of a graph, whatever the mesh: its operations as loops over dimensions.

A planner asks for hundreds of meshes of one graph, so this is read once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from moecc.ir.graph import Node, Value
from moecc.ir.sharding_rules import Given, Space, sharded_results, space_of
from moecc.ir.table.slots import is_slots
from moecc.ir.traits import Cost, Product
from moecc.types.tensor import Axis, TensorType


@dataclass(frozen=True, eq=False)
class Site:
    """An operation of a graph, as propagation sees it.

    Attributes:
      node: the node.
      operands: its operands.
      space: which axis runs along which dimension.
      dimensions: the axes along each dimension, of operands and results, and the counts that its
        shards must divide.
    """

    node: Node
    operands: tuple[Value, ...]
    space: Space
    dimensions: Mapping[str, Sequence[Axis]]

    @cached_property
    def is_product(self) -> bool:
        """Whether the rules decide what is brought where; others stay where their operands are.

        What costs FLOPs or reads a table does, so that its operands come to it.
        """
        return self.node.op.cost in (Cost.PRODUCT, Cost.ATTENTION, Cost.LOOK_UP)

    @cached_property
    def names(self) -> dict[str, tuple[str, ...]]:
        """The names of the axes along each dimension."""
        return {d: tuple({a.name: None for a in axes}) for d, axes in self.dimensions.items()}

    @cached_property
    def by_axis(self) -> dict[str, list[str]]:
        """The dimensions along which each axis runs, by its name."""
        found: dict[str, list[str]] = {}
        for dimension, names in self.names.items():
            for name in names:
                found.setdefault(name, []).append(dimension)
        return found

    @cached_property
    def _results(self) -> dict[tuple[TensorType, ...], tuple[TensorType, ...]]:
        return {}

    def results(self, types: Sequence[TensorType]) -> tuple[TensorType, ...]:
        """Return the types of its results where its operands have `types`; worked out once.

        Raises:
          InputError: the operation does not accept an operand's sharding.
        """
        key = tuple(types)
        if key not in self._results:
            given = [Given(v.name, t) for v, t in zip(self.operands, key, strict=True)]
            bare = [v.type for v in self.node.results]
            self._results[key] = sharded_results(self.node.op, self.space, given, bare, None)
        return self._results[key]

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """The positions of the operands that are slots."""
        return tuple(i for i, v in enumerate(self.operands) if is_slots(v))


def sites_of(nodes: Iterable[Node]) -> list[Site]:
    """Return the operations of `nodes`, which are in topological order."""
    return [_site(node) for node in nodes]


def _site(node: Node) -> Site:
    space = space_of(node.op, node.operands, node.attrs)
    dimensions: dict[str, list[Axis]] = {}
    values = [
        *zip(node.operands, space.operands, strict=True),
        *((v, space.result) for v in node.results),
    ]
    for value, names in values:
        for axis in value.type.axes:
            if axis.name in names:
                along, one = dimensions.setdefault(names[axis.name], []), Axis(axis.name, axis.size)
                if one not in along:
                    along.append(one)
    for name, (what, count) in space.counts.items():
        dimensions[name].append(Axis(what, count))
    return Site(node, tuple(node.operands), space, dimensions)


def cuts_of(sites: Iterable[Site]) -> dict[str, set[int]]:
    """Return, by the name of an axis, the numbers of parts that it is cut into or merged from.

    Names of axes mean one thing in all of a model, so what a projection is cut into later counts
    where it is made.
    """
    cuts: dict[str, set[int]] = {}
    for site in sites:
        sizes = site.node.op.sizes
        product = None if sizes is None else sizes(site.node)
        if not isinstance(product, Product) or not isinstance(product.parts[0], int):
            continue
        whole = _whole(site.node)
        if whole is not None:
            cuts.setdefault(whole, set()).add(product.parts[0])
    return cuts


def _whole(node: Node) -> str | None:
    """Return the axis that a node cuts, or that it merges others into."""
    before, after = node.operands[0].type, node.result.type
    if len(after) < len(before):
        before, after = after, before
    changed = (a.name for a in before if a.name not in after or after[a.name].size != a.size)
    return next(changed, None)
