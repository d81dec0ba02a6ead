"""One layer of each kind: the nodes whose sharding determines that of the whole model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from moecc.ir.graph import Graph, Node, Value
from moecc.plan.shapes import Shape
from moecc.sharding.alike import Alike
from moecc.sharding.assign import ROWS, Assigner
from moecc.sharding.collectives import Sent, sent, steps
from moecc.sharding.gradients import Dependence, Gradients, dependence, gradients
from moecc.sharding.layout import Layout
from moecc.sharding.propagate import Propagation, propagate
from moecc.sharding.sites import Site, cuts_of, sites_of
from moecc.types.dtypes import F32
from moecc.types.tensor import Axis, TensorType

Found = tuple[Propagation, Gradients]
"""How values are sharded, and what the backward pass sums."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One layer of each kind, and what propagation reads of it.

    Attributes:
      graph: the layers, a graph of their own: passes may change the model meanwhile.
    """

    graph: Graph
    _found: Alike[Found] = field(default_factory=Alike)
    _alone: dict[Shape, tuple[TensorType, Sequence[Axis]]] = field(default_factory=dict)
    _sent: dict[tuple[TensorType, TensorType], tuple[Sent, ...]] = field(default_factory=dict)

    @cached_property
    def sites(self) -> Mapping[Node, Site]:
        """The nodes as propagation sees them, in order."""
        return {site.node: site for site in sites_of(self.graph)}

    @cached_property
    def _cuts(self) -> Mapping[str, set[int]]:
        return cuts_of(self.sites.values())

    @cached_property
    def _depends(self) -> Dependence:
        return dependence(self.sites.values(), self.graph.inputs.values())

    def shard(self, layout: Layout) -> Found:
        """Return how the values are sharded under a layout, and what the backward pass sums.

        Raises:
          InputError: an operation cannot take its operands.
        """
        return self._found.under(layout, None, self._shard)

    def alone(self, shape: Shape, layout: Layout) -> TensorType:
        """Return how a value of `shape` is sharded that is looked at by itself.

        The groups of rows, which a shape counts as slots, are an axis of their own.
        """
        if shape not in self._alone:
            self._alone[shape] = _alone(shape)
        return layout.assigner.lone(*self._alone[shape])

    def resharded(self, source: TensorType, target: TensorType) -> tuple[Sent, ...]:
        """Return the collectives that bring a value of type `source` to where `target` is."""
        key = (source, target)
        if key not in self._sent:
            self._sent[key] = tuple(sent(source, steps(source, target)))
        return self._sent[key]

    def _shard(self, assigner: Assigner) -> Found:
        sites, graph = tuple(self.sites.values()), self.graph
        inputs, params = graph.inputs.values(), graph.params.values()
        found = propagate(sites, inputs, params, assigner, self._cuts)
        return found, gradients(sites, found, self._depends)


def sample_of(
    graph: Graph, chosen: Collection[Node], same: Mapping[Value, Value]
) -> tuple[Sample, dict[Node, Node]]:
    """Return the sample of `graph` that has the nodes `chosen`, and its node for each of them.

    Args:
      graph: the model.
      chosen: the nodes of one layer of each kind.
      same: by the value of a node that is left out, that of the node that stands for it.
    """
    copy, nodes = Graph(graph.name), dict[Node, Node]()
    values = {value: copy.input(name, value.type) for name, value in graph.inputs.items()}
    taken = {v for node in chosen for v in node.operands}
    for name, value in graph.params.items():
        # What nothing takes is stored all the same.
        if value in taken or not value.users:
            values[value] = copy.param(name, value.type)
    for node in graph:
        if node not in chosen:
            continue
        operands = [values[same.get(v, v)] for v in node.operands]
        names = [v.name for v in node.results]
        made = copy.append(node.op, operands, dict(node.attrs), names=names, loc=node.loc)
        values.update(zip(node.results, made.results, strict=True))
        nodes[node] = made
    return Sample(copy), nodes


def _alone(shape: Shape) -> tuple[TensorType, Sequence[Axis]]:
    """Return a type of `shape`, and the axes that run beside it where it is used."""
    if shape.has_slots:
        axes = [Axis("group", "group"), *(Axis(name, name) for name in shape.names)]
        return TensorType(F32, tuple(axes)), ()
    axes = [Axis(name, int(size) if size == int(size) else name) for name, size in shape]
    # An axis of this name meets rows; that of a router's choices has another.
    return TensorType(F32, tuple(axes)), ROWS if "expert" in shape.names else ()
