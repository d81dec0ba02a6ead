"""The pass ``trace-routing``: the routing of tokens as outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from moecc.errors import InputError, Problem
from moecc.ir.graph import Graph
from moecc.pipeline.passes import EXACT, Context, Pass, PassResult
from moecc_passes.routed import NOTHING_ROUTED, routed_layers

PREFIX = "trace."


@dataclass(frozen=True)
class TraceRoutingPass(Pass):
    """Return, for every routed layer, the chosen experts, their gates, slots and logits.

    Before::

        %p = assign_slots %e {tokens=(batch, seq), experts=8} : i32[…, choice=2] @layers.3.ffn
        output logits = %y

    After::

        output logits = %y
        output trace.layers.3.ffn.experts = %e
        output trace.layers.3.ffn.gates = %g
        output trace.layers.3.ffn.slots = %p     # −1: dropped
        output trace.layers.3.ffn.logits = %l    # where experts are chosen by route

    With the ids of the tokens this is the specialisation of ST-MoE, section 7.
    """

    name: ClassVar[str] = "trace-routing"
    summary: ClassVar[str] = "return which tokens went to which experts"
    must_match: ClassVar[bool] = True
    preserves = EXACT

    def validate_after(self, earlier: Sequence[Pass]) -> list[Problem]:
        """Return a problem if an earlier pass traces already."""
        if not any(isinstance(item, TraceRoutingPass) for item in earlier):
            return []
        return [Problem("a graph is traced once", hint="one trace-routing, after the conversion")]

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Add the outputs.

        Raises:
          InputError: the graph has such outputs already.
        """
        present = [n for n in graph.output_names if n.startswith(PREFIX)]
        if present:
            raise InputError("the graph is traced already", found=", ".join(present[:5]))
        layers = routed_layers(graph)
        for layer in layers:
            values = {"experts": layer.experts, "gates": layer.gates, "slots": layer.slots}
            if layer.route is not None:
                values["logits"] = layer.route.operands[0]
            for name, value in values.items():
                graph.set_output(f"{PREFIX}{layer.name}.{name}", value)
        missing = [] if layers else [NOTHING_ROUTED]
        stats = {"layers": len(layers)}
        return PassResult(bool(layers), len(layers), stats, near_misses=missing)
