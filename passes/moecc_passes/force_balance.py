"""The pass ``force-balance``: experts in turn, whatever the router says, for timing alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Node
from moecc.ir.ops.routing import RouteOp
from moecc.pipeline.passes import Context, Pass, PassResult, Preserves, Remark
from moecc_passes.routed import NOTHING_ROUTED, RoutedLayer, routed_layers


@dataclass(frozen=True)
class ForceBalancePass(Pass):
    """Let tokens take experts in turn: every expert has as many rows, whatever its router says.

    Before::

        %e, %g = route %l {top_k=2} : i32[batch=B, seq=S, choice=2], f32[batch=B, seq=S, choice=2]

    After::

        %e, %g = route %l {top_k=2} : …
        %n = positions %e {axis=seq} : i32[seq=S]
        %t = hash_experts %n {experts=8, top_k=2, hash=modulo} : i32[seq=S, choice=2]
        %f = broadcast %t, %e : i32[batch=B, seq=S, choice=2]    # in place of %e

    A router that has not learned yet sends tokens unevenly; the time of a step then says little
    about that of a trained model.  The gates are still those of the router, so that all of its
    work is done.
    """

    name: ClassVar[str] = "force-balance"
    summary: ClassVar[str] = "let tokens take experts in turn, to time a step"
    must_match: ClassVar[bool] = True

    @property
    def preserves(self) -> Preserves:
        """Nothing is preserved: tokens go to other experts."""
        return Preserves("approximate", "tokens go to experts in turn, not to those of the router")

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Replace the choices of every router; experts that choose are balanced as they are."""
        layers = routed_layers(graph)
        changed = 0
        for layer in layers:
            if layer.route is None:
                ctx.remark(Remark(layer.name, "is left: its router does not choose"))
                continue
            _force(layer, layer.route)
            changed += 1
        missing = [] if layers else [NOTHING_ROUTED]
        return PassResult(changed > 0, len(layers), {"layers": changed}, near_misses=missing)


def _force(layer: RoutedLayer, route: Node) -> None:
    attrs, chosen = RouteOp.of_node(route), route.results[0]
    (experts,) = (a.size for a in route.operands[0].type if a.name == attrs.axis)
    assert isinstance(experts, int), "the number of experts is known"
    users = list(chosen.users)
    builder = Builder(route.graph, loc=route.loc, origin="force-balance", before=route._next)
    numbers = builder.positions(chosen, axis=layer.tokens[-1])
    turns = builder.hash_experts(
        numbers, experts=experts, top_k=attrs.top_k, choice=attrs.choice, hash="modulo"
    )
    forced = builder.broadcast(turns, chosen)
    for node in users:
        for index, value in enumerate(node.operands):
            if value is chosen:
                node.set_operand(index, forced)
