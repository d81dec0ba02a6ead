"""Dead-code elimination."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from moecc.ir.graph import Graph
from moecc.pipeline.passes import EXACT, Context, Pass, PassResult


@dataclass(frozen=True)
class DcePass(Pass):
    """Erase the nodes and parameters that no output depends on.

    Inputs stay: they are how the graph is called.

    Before::

        param %w : f32[embed=4, mlp=8]
        %a = silu %x : f32[batch=B, embed=4]
        %b = contract %x, %w {over=embed} : f32[batch=B, mlp=8]
        output y = %a

    After::

        %a = silu %x : f32[batch=B, embed=4]
        output y = %a
    """

    name: ClassVar[str] = "dce"
    summary: ClassVar[str] = "erase nodes and parameters that no output depends on"
    takes_rolled: ClassVar[bool] = True
    preserves = EXACT

    keep_params: Annotated[bool, "keep unused parameters"] = False

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Erase dead nodes, users before their operands."""
        nodes = 0
        for node in graph.walk_back():
            if node.is_dead:
                node.erase()
                nodes += 1
        unused = [] if self.keep_params else [n for n, v in graph.params.items() if not v.users]
        for name in unused:
            graph.erase_param(name)
        stats = {"nodes-erased": nodes, "params-erased": len(unused)}
        return PassResult(nodes + len(unused) > 0, nodes + len(unused), stats)
