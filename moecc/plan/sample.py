"""One layer of each kind: the nodes whose sharding says that of the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from moecc.ir.graph import Graph, Node, Value
from moecc.sharding.assign import Assigner
from moecc.sharding.gradients import Dependence, Gradients, dependence, gradients
from moecc.sharding.propagate import Propagation, propagate
from moecc.sharding.sites import Site, cuts_of, sites_of


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

    def shard(self, assigner: Assigner) -> tuple[Propagation, Gradients]:
        """Return how the values are sharded by rules, and what the backward pass sums.

        Raises:
          InputError: an operation cannot take its operands.
        """
        sites, inputs = tuple(self.sites.values()), self.graph.inputs.values()
        found = propagate(sites, inputs, self.params, assigner, self._cuts)
        return found, gradients(sites, found, self._depends)
