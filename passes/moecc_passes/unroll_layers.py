"""The pass ``unroll-layers``: unroll every repeated layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moecc.ir.graph import Graph
from moecc.ir.unroll import unroll
from moecc.pipeline.passes import EXACT, Context, Pass, PassResult


@dataclass(frozen=True)
class UnrollLayersPass(Pass):
    """Unroll every layer that ``roll-layers`` folded: its inverse.

    Before::

        param %layers.{0..1}.w : f32[layer=2, mlp=8, embed=8] = stack(source("layers.0.w" : …), …, axis=layer)
        %b = scan %x, %layers.{0..1}.w {over=(layer=2), carries=1, stacked=1} : … @layers {
          …
        }

    After::

        param %layers.0.w : f32[mlp=8, embed=8] = source("layers.0.w" : f32[mlp=8, embed=8]) @layers.0.ffn
        param %layers.1.w : f32[mlp=8, embed=8] = source("layers.1.w" : f32[mlp=8, embed=8]) @layers.1.ffn
        %a = contract %x, %layers.0.w {over=embed} : f32[batch=B, mlp=8] @layers.0.ffn
        …

    The ranges in names and locations say which layer is which.
    """  # noqa: E501

    name: ClassVar[str] = "unroll-layers"
    summary: ClassVar[str] = "unroll every repeated layer"
    takes_rolled: ClassVar[bool] = True
    preserves = EXACT

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Unroll every scan."""
        nodes = len(graph)
        scans = unroll(graph)
        stats = {"scans": scans, "nodes-added": len(graph) - nodes}
        return PassResult(scans > 0, scans, stats)
