"""The parts of a routed layer whose number of experts is to change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moecc.errors import InputError, Problem
from moecc.ir.attributes import RouteAttrs
from moecc.ir.gates import convention
from moecc.ir.graph import Graph, Node, Value
from moecc.types.tensor import tensor
from moecc.weights.expr import Expr, Source
from moecc.weights.movement import Index
from moecc.weights.simplify import simplify
from moecc_passes.routed import RoutedLayer, routed_layers

EXPERT = "expert"


@dataclass(frozen=True)
class Anatomy:
    """A routed layer that can be built anew with other experts.

    Attributes:
      layer: the layer.
      route: the node that chooses experts.
      routing: the nodes from the router's product to the slots, ``dispatch`` included, in order.
      body: the nodes of the experts, in order.
      params: the parameters with an axis of experts.
    """

    layer: RoutedLayer
    route: Node
    routing: tuple[Node, ...]
    body: tuple[Node, ...]
    params: tuple[Value, ...]

    @property
    def attrs(self) -> RouteAttrs:
        """The attributes of the choice."""
        return RouteAttrs.of_node(self.route)

    @property
    def experts(self) -> int:
        """The number of experts."""
        return self.layer.assignment.experts

    @property
    def name(self) -> str:
        """Its location."""
        return self.layer.name

    @property
    def x(self) -> Value:
        """The tokens, ``[*tokens, embed]``."""
        return self.layer.dispatch.operands[0]

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All nodes, in order."""
        return (*self.routing, *self.body, self.layer.combine)

    @property
    def router(self) -> Value:
        """The router's matrix."""
        return next(p for p in self.params if p in self.routing[0].operands)

    @property
    def bias_of_choice(self) -> Value | None:
        """The bias that takes part in the choice alone, if there is one."""
        return next(iter(self.route.operands[1:]), None)

    @property
    def bias_of_logits(self) -> Value | None:
        """A parameter that is added to the router's product, if there is one."""
        added = {v for node in self.routing if node.op.is_sum for v in node.operands}
        return next((param for param in self.params if param in added), None)

    def bias_factor(self, times: float) -> float:
        """Return what a bias of the choice is multiplied by where there are `times` the experts.

        It is added to scores: probabilities become smaller with more experts, sigmoids do not.
        """
        return 1 / times if convention(self.attrs.gates).score == "softmax" else 1.0

    def is_last(self, param: Value) -> bool:
        """Whether a parameter is the experts' last matrix, or is added after it."""
        last = self.layer.last_matrix
        if last is None or param.users.keys().isdisjoint(self.body):
            return False
        users = [node for node in self.body if node in param.users]
        return all(self.body.index(node) >= self.body.index(last) for node in users)


def members(param: Value) -> list[Expr]:
    """Return the weight of each expert, simplified: those of copies are equal."""
    plain = tensor(param.type.dtype, **{a.name: a.size for a in param.type})
    weight = Source(param.name, plain) if param.weight is None else param.weight
    count = param.type[EXPERT].size
    assert isinstance(count, int), "experts are counted"
    return [simplify(Index(weight, EXPERT, at)) for at in range(count)]


def anatomies(graph: Graph) -> list[Anatomy]:
    """Return the routed layers of `graph`, in order.

    Raises:
      InputError: one cannot be built anew; all of them at once.
    """
    found = [of_layer(layer) for layer in routed_layers(graph)]
    problems = [one for one in found if isinstance(one, Problem)]
    if problems:
        raise InputError(problems)
    return [one for one in found if isinstance(one, Anatomy)]


def of_layer(layer: RoutedLayer) -> Anatomy | Problem:
    """Return the parts of a layer, or why it cannot be built anew."""
    route, router = layer.route, layer.router
    if route is None or router is None or layer.scorer is not route or not route.op.routes:
        what = "only experts that a token chooses by a router can be changed"
        return Problem(what, layer.name, hint="prototypes, a hash, soft mixtures are left")
    nodes = list(_between(router, layer.combine))
    inside = {*nodes, layer.combine}
    read = [v for node in nodes for v in node.results if not v.users.keys() <= inside]
    if read:
        return Problem(
            "its routing is read elsewhere, too", layer.name,
            found=f"%{read[0].name}",
            hint="run this pass before add-losses or specialize; st-moe{losses=false} adds none",
        )  # fmt: skip
    at = nodes.index(layer.dispatch)
    operands = dict.fromkeys(v for node in nodes for v in node.operands if v.is_param)
    params = tuple(v for v in operands if EXPERT in v.type)
    return Anatomy(layer, route, tuple(nodes[: at + 1]), tuple(nodes[at + 1 :]), params)


def _between(first: Node, last: Node) -> Iterator[Node]:
    """Yield `first` and the nodes before `last` that depend on it, in order."""
    values = set(first.results)
    yield first
    node = first._next
    while node is not None and node is not last:
        if not values.isdisjoint(node.operands):
            values.update(node.results)
            yield node
        node = node._next
