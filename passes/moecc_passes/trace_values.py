"""The pass ``trace-values``: what goes into blocks and experts, and comes out, as outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, ClassVar

from moecc.analysis import find_ffn_blocks
from moecc.errors import InputError
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Value
from moecc.pipeline.passes import EXACT, Context, Pass, PassResult
from moecc.rewrite.pattern import NearMiss
from moecc_passes.routed import RoutedLayer, routed_layers

PREFIX = "values."


@dataclass(frozen=True)
class TraceValuesPass(Pass):
    """Return the input and the hidden value of dense blocks, and each expert's result of tokens.

    Before::

        %m = mul %s, %u : f32[batch=B, seq=S, mlp=1536]           @layers.3.ffn
        output logits = %y

    After::

        output logits = %y
        output values.layers.3.ffn.input = %n
        output values.layers.3.ffn.hidden = %m

    A layer of experts has the outputs ``experts``, ``gates`` and, for each choice c, ``result.c``:
    what the expert of that choice made of the token, before it is multiplied by its gate.
    ``moecc capture`` takes statistics of them.
    """

    name: ClassVar[str] = "trace-values"
    summary: ClassVar[str] = "return what goes into blocks and experts, and comes out"
    must_match: ClassVar[bool] = True
    preserves = EXACT

    at: Annotated[str, "the locations, as a pattern of the shell: layers.3.*"] = "*"

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Add the outputs.

        Raises:
          InputError: the graph has such outputs already.
        """
        present = [n for n in graph.output_names if n.startswith(PREFIX)]
        if present:
            raise InputError("values are traced already", found=", ".join(present[:5]))
        values = dict(self._values(graph))
        for name, value in values.items():
            graph.set_output(f"{PREFIX}{name}", value)
        layers = len({name.rpartition(".")[0] for name in values})
        missing = NearMiss(self.name, "the graph", f"no block or layer of experts is at {self.at}")
        return PassResult(
            bool(values), layers, {"values": len(values)}, near_misses=[] if values else [missing]
        )

    def _values(self, graph: Graph) -> Iterator[tuple[str, Value]]:
        for block in find_ffn_blocks(graph).blocks:
            if fnmatchcase(block.loc, self.at):
                yield f"{block.loc}.input", block.x
                yield f"{block.loc}.hidden", block.down.operands[0]
        for layer in routed_layers(graph):
            if fnmatchcase(layer.name, self.at) and not layer.experts_choose:
                yield f"{layer.name}.experts", layer.experts
                yield f"{layer.name}.gates", layer.gates
                for choice in range(layer.top_k):
                    yield f"{layer.name}.result.{choice}", _result(graph, layer, choice)


def _result(graph: Graph, layer: RoutedLayer, choice: int) -> Value:
    """Emit what the expert of one choice made of each token: the sum with a gate of 1 for it."""
    loc, node = layer.combine.loc, layer.combine
    b = Builder(graph, loc=loc, origin="trace-values", before=node)
    rows, experts, slots, gates = node.operands[:4]
    number = b.constant(value=float(choice), dtype="i32")
    places = b.positions(gates, axis=layer.choice)
    is_chosen = b.broadcast(b.equal(places, b.broadcast(number, places)), gates)
    ones = b.broadcast(b.constant(value=1.0, dtype=gates.type.dtype.name), gates)
    return b.combine(rows, experts, slots, b.mask(ones, is_chosen, fill=0.0))
