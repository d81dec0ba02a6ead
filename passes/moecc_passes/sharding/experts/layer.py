"""A routed layer on a mesh: over which mesh axes its tokens and experts are sharded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moecc.errors import InputError
from moecc.ir.graph import Graph, Node, Value
from moecc_passes.routed import RoutedLayer, routed_layers


@dataclass(frozen=True)
class LaidLayer:
    """A routed layer, and what brings its rows to the experts and back.

    Attributes:
      routed: the layer.
      entries: the collectives that take the dispatched rows to the experts.
      gate_entries: those that take gates there, where these go with the rows.
      made: what the experts made of them, before anything brings it back.
      expert_mesh: the mesh axes that shard the experts.
    """

    routed: RoutedLayer
    entries: tuple[Node, ...]
    gate_entries: tuple[Node, ...]
    made: Value
    expert_mesh: tuple[str, ...]

    @property
    def token_mesh(self) -> tuple[str, ...]:
        """The mesh axes that shard the outermost token axis."""
        return self.routed.slots.type[self.routed.tokens[0]].mesh

    @property
    def is_ragged(self) -> bool:
        """Whether the rows of an expert are not bounded."""
        return bool(self.routed.assigner.attrs["slots"] == "ragged")

    @property
    def exchanged(self) -> tuple[str, ...]:
        """The mesh axes that shard both tokens and experts, in the order of the tokens."""
        return tuple(m for m in self.token_mesh if m in self.expert_mesh)


def laid_layers(graph: Graph) -> list[LaidLayer]:
    """Return the routed layers of `graph` whose experts are sharded, in order."""
    found: list[LaidLayer] = []
    for routed in routed_layers(graph):
        rows = routed.dispatch.results[0]
        gates = () if routed.gate_dispatch is None else (routed.gate_dispatch.result,)
        entries, gate_entries = map(_collectives, ((rows,), gates))
        made = _before_collectives(routed.combine.operands[0])
        mesh = made.type["expert"].mesh
        if mesh:
            found.append(LaidLayer(routed, entries, gate_entries, made, mesh))
    return found


def _collectives(values: Iterable[Value]) -> tuple[Node, ...]:
    return tuple(n for v in values for n in v.users if n.op.collective is not None)


def _before_collectives(value: Value) -> Value:
    while value.node is not None and value.node.op.collective is not None:
        value = value.node.operands[0]
    return value


def need(holds: bool, layer: LaidLayer, what: str, expected: str, hint: str) -> None:
    """Raise InputError unless `holds`, with the sharding of tokens and experts of `layer`."""
    if holds:
        return
    tokens = "*".join(layer.token_mesh) or "no mesh axis"
    experts = "*".join(layer.expert_mesh)
    slots = layer.routed.assigner.attrs["slots"]
    raise InputError(
        what,
        where=layer.routed.name,
        expected=expected,
        found=f"tokens on {tokens}, experts on {experts}, slots={slots}",
        hint=hint,
    )
