"""The routed layers of a graph, as the passes that work on routing see them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moecc.ir.graph import Graph, Node, Value
from moecc.ir.losses import Routed
from moecc.ir.table.placing import PLACING, given_to


@dataclass(frozen=True)
class Router:
    """Where a router's logits are made.

    Attributes:
      product: the contraction of tokens with the router's weight.
      reader: the node that reads its result.
    """

    product: Node
    reader: Node


@dataclass(frozen=True)
class RoutedLayer:
    """One mixture of experts.

    Attributes:
      placing: the node that gives slots: ``place`` or ``expert_choice``.
      route: the node that chooses experts, or None where it is not ``route``.
      combine: the node that brings results back.
      dispatch: the node that moves tokens to the experts.
      name: its location; with a number where a location has several.
    """

    placing: Node
    route: Node | None
    combine: Node
    dispatch: Node
    name: str

    @property
    def place(self) -> Value:
        """The slots."""
        return self.placing.results[-1]

    @property
    def gates(self) -> Value:
        """What the rows are weighted by."""
        return self.combine.operands[3]

    @property
    def experts(self) -> Value:
        """The chosen experts."""
        return self.combine.operands[1]

    @property
    def tokens(self) -> tuple[str, ...]:
        """The token axes, outermost first."""
        tokens: tuple[str, ...] = self.placing.attrs["tokens"]
        return tokens

    @property
    def top_k(self) -> int:
        """The choices of a token."""
        (size,) = (a.size for a in self.place.type if a.name not in self.tokens)
        assert isinstance(size, int), "the choices are counted"
        return size

    @property
    def choice(self) -> str:
        """The name of the axis of choices."""
        (name,) = (n for n in self.place.type.names if n not in self.tokens)
        return name

    @property
    def last_matrix(self) -> Node | None:
        """The experts' last contraction, before an output bias; None where it was not found."""
        node = self.combine.operands[0].node
        while node is not None and node.op.name in ("add", "scale"):
            node = node.operands[0].node
        return node if node is not None and node.op.name == "contract" else None

    @property
    def router(self) -> Router | None:
        """The product that makes logits, and what reads it; None where nothing is scored."""
        behind = [self.placing]
        for reader in behind:
            for value in reader.operands[:1] if reader is self.placing else reader.operands:
                if value.node is None:
                    continue
                if value.node.op.name == "contract":
                    return Router(value.node, reader)
                if value.node.op.name in _SCORING:
                    behind.append(value.node)
        return None

    def given(self) -> dict[str, Value]:
        """What the slots are given beside the experts, by word."""
        return given_to(self.placing.operands, self.placing.attrs)

    def routed(self) -> Routed | None:
        """Return what losses look at, or None where experts are not chosen by ``route``."""
        if self.route is None:
            return None
        logits = self.route.operands[0]
        gates = self.route.results[1]
        clean, std = _clean(logits)
        return Routed(logits, self.experts, gates, self.place, clean, std)


_SCORING = ("route", "split", "softmax", "add", "merge")
"""What may stand between the router's product and the slots, noise and prototypes included."""


def routed_layers(graph: Graph) -> list[RoutedLayer]:
    """Return the routed layers of `graph`, in order; those without a combination are left out."""
    found: list[RoutedLayer] = []
    names: dict[str, int] = {}
    for node in graph:
        if node.op.name not in PLACING:
            continue
        combine, dispatch = (_user(node.results[-1], n) for n in ("combine", "dispatch"))
        if combine is None or dispatch is None:
            continue
        base = node.loc or "layer"
        names[base] = names.get(base, 0) + 1
        name = base if names[base] == 1 else f"{base}.{names[base]}"
        found.append(RoutedLayer(node, _route_of(node), combine, dispatch, name))
    return found


def _user(value: Value, name: str) -> Node | None:
    return next((n for n in value.users if n.op.name == name), None)


def _route_of(placing: Node) -> Node | None:
    node = placing.operands[0].node
    return node if node is not None and node.op.name == "route" else None


def _clean(logits: Value) -> tuple[Value | None, float]:
    """Return the logits without the noise that was added, and its standard deviation."""
    if logits.node is None or logits.node.op.name != "add":
        return None, 0.0
    for clean, noise in (logits.node.operands, logits.node.operands[::-1]):
        if noise.node is not None and noise.node.op.name == "random_normal":
            return clean, noise.node.attrs["std"]
    return None, 0.0


def causal_values(graph: Graph) -> set[Value]:
    """Return the values that attention under a causal mask has an influence on.

    A layer that reads such a value is one of a decoder: what it does to a token must not depend on
    later ones.
    """
    causal: set[Value] = set()
    for node in graph:
        if any(v in causal for v in node.operands) or _masks_causally(node):
            causal.update(node.results)
    return causal


def _masks_causally(node: Node) -> bool:
    if node.op.name != "mask":
        return False
    return any(n.op.name == "causal" for n in _behind(node.operands[1], 3))


def _behind(value: Value, steps: int) -> Iterator[Node]:
    """Yield the nodes that `value` is made by, up to `steps` of them in a row."""
    values = [value]
    for _ in range(steps):
        nodes = [v.node for v in values if v.node is not None]
        yield from nodes
        values = [v for n in nodes for v in n.operands]
