"""The pass ``fuse-gate-up``: fuse gate and up, of a dense block or of experts, into one product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moecc.ir.graph import Graph
from moecc.pipeline.passes import Context, Pass, PassResult, Preserves
from moecc.rewrite.fuse_siblings import fuse_siblings


@dataclass(frozen=True)
class FuseGateUpPass(Pass):
    """Contract a value once, with the concatenated matrices of gate and up, and split the result.

    One large product is faster than two half as large.  Where the matrices cannot become one (a
    parameter that something else reads too, element types that differ on disk, an axis that is
    sharded, no weight expression) nothing is changed and nothing is said.  A graph of this form
    is for running: no family has such a layer, so export before it, and lay it on its mesh before
    it, too: what is cut along the neurons then stays two products.

    Before::

        param %gate : f32[mlp=1536, embed=576] = source("gate" : bf16[mlp=1536, embed=576])
        param %up : f32[mlp=1536, embed=576] = source("up" : bf16[mlp=1536, embed=576])
        %a = contract %n, %gate {over=embed} : f32[batch=B, seq=S, mlp=1536]
        %u = contract %n, %up {over=embed} : f32[batch=B, seq=S, mlp=1536]
        %s = silu %a : f32[batch=B, seq=S, mlp=1536]
        %m = mul %s, %u : f32[batch=B, seq=S, mlp=1536]
        %y = contract %m, %down {over=mlp} : f32[batch=B, seq=S, embed=576]

    After::

        param %gate.fused : f32[mlp=3072, embed=576] = concat(source("gate" : …), …, axis=mlp)
        %fused = contract %n, %gate.fused {over=embed} : f32[batch=B, seq=S, mlp=3072]
        %a = slice %fused {axis=mlp, start=0, stop=1536} : f32[batch=B, seq=S, mlp=1536]
        %u = slice %fused {axis=mlp, start=1536, stop=3072} : f32[batch=B, seq=S, mlp=1536]
        …

    It is not bit-exact: a product of another shape adds in another order.
    """

    name: ClassVar[str] = "fuse-gate-up"
    summary: ClassVar[str] = "contract a value with gate and up at once"
    preserves = Preserves("reassociation", "a product of another shape adds in another order")

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Fuse all siblings."""
        made = fuse_siblings(graph, origin=f"{self.name}/concatenate")
        parts = sum(len(fusion.parts) for fusion in made)
        stats = {"products-fused": parts, "products-made": len(made)}
        return PassResult(bool(made), len(made), stats)
