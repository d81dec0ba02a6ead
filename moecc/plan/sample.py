"""One layer of each kind: the nodes whose sharding says that of the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from moecc.ir.graph import Graph, Node, Value
from moecc.sharding.assign import Assigner, divides
from moecc.sharding.collectives import Sent, sent, steps
from moecc.sharding.gradients import Dependence, Gradients, dependence, gradients
from moecc.sharding.layout import Layout
from moecc.sharding.propagate import Propagation, propagate
from moecc.sharding.sites import Site, cuts_of, sites_of
from moecc.types.tensor import TensorType

Key = tuple[tuple[str, ...], tuple[str, ...]]
"""The names of rules, and of the axes of a mesh."""

Answers = Mapping[tuple[int, tuple[str, ...]], bool]
"""Whether numbers are divided by mesh axes."""

Found = tuple[Propagation, Gradients]


@dataclass(frozen=True, eq=False)
class Sample:
    """The nodes of one layer of each kind, and what propagation reads of them.

    Attributes:
      graph: the model.
      nodes: the nodes, in order.
      same: by the value of a node that is left out, that of the node that stands for it.
    """

    graph: Graph
    nodes: Sequence[Node]
    same: Mapping[Value, Value]
    _known: dict[Key, list[tuple[Answers, Found]]] = field(default_factory=dict)
    _sent: dict[tuple[TensorType, TensorType], tuple[Sent, ...]] = field(default_factory=dict)

    @cached_property
    def sites(self) -> Mapping[Node, Site]:
        """The nodes as propagation sees them, in order."""
        return {site.node: site for site in sites_of(self.nodes, self.same)}

    @cached_property
    def params(self) -> tuple[Value, ...]:
        """The parameters that the nodes take, and those that nothing takes."""
        found = [v for node in self.nodes for v in node.operands if v.is_param]
        found += [v for v in self.graph.params.values() if not v.users]
        return tuple(dict.fromkeys(found))

    @cached_property
    def _cuts(self) -> Mapping[str, set[int]]:
        return cuts_of(self.sites.values())

    @cached_property
    def _depends(self) -> Dependence:
        return dependence(self.sites.values(), self.graph.inputs.values())

    def shard(self, layout: Layout) -> Found:
        """Return how the values are sharded under a layout, and what the backward pass sums.

        Of meshes that differ in their sizes alone most shard all values over the same mesh axes:
        those on which what was asked when it was worked out has the same answers.

        Raises:
          InputError: an operation cannot take its operands.
        """
        known = self._known.setdefault((layout.names, layout.mesh.names), [])
        for asked, found in known:
            if all(divides(n, layout.mesh, axes) is yes for (n, axes), yes in asked.items()):
                return found
        assigner = replace(layout.assigner, asked={})
        found = self._shard(assigner)
        known.append((assigner.asked, found))
        return found

    def resharded(self, source: TensorType, target: TensorType) -> tuple[Sent, ...]:
        """Return the collectives that bring a value of type `source` to where `target` is."""
        key = (source, target)
        if key not in self._sent:
            self._sent[key] = tuple(sent(source, steps(source, target)))
        return self._sent[key]

    def _shard(self, assigner: Assigner) -> Found:
        sites, inputs = tuple(self.sites.values()), self.graph.inputs.values()
        found = propagate(sites, inputs, self.params, assigner, self._cuts)
        return found, gradients(sites, found, self._depends)
