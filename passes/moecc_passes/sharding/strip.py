"""The pass ``strip-sharding``: the graph as it was before it was laid on a mesh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moecc.ir.graph import Graph
from moecc.ir.mesh import mesh_of, set_mesh
from moecc.ir.table.collectives import COLLECTIVES
from moecc.pipeline.passes import EXACT, Context, Pass, PassResult
from moecc_passes.sharding.groups import restore_groups


@dataclass(frozen=True)
class StripShardingPass(Pass):
    """Take the mesh away, and every collective that is the identity on the global value.

    Before::

        attr mesh = {"data": 4}
        %g = all_gather %w {axis=embed, mesh=data} : f32[mlp=64, embed=16]
        %h = contract %x, %g {over=embed} : f32[batch@data=B, seq=S, mlp=64]

    After::

        %h = contract %x, %w {over=embed} : f32[batch=B, seq=S, mlp=64]
    """

    name: ClassVar[str] = "strip-sharding"
    summary: ClassVar[str] = "take the mesh and its collectives away"
    preserves = EXACT

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Erase the collectives, and make every type one of global values alone."""
        erased = 0
        for node in list(graph):
            if node.op.name in COLLECTIVES:
                node.replace_by(node.operands[0])
                erased += 1
        changed = mesh_of(graph) is not None or erased > 0
        set_mesh(graph, None)
        restore_groups(graph)
        for value in (*graph.inputs.values(), *graph.params.values()):
            value.type = value.type.bare
        for node in graph:
            types = node.op.result_types(node.operands, node.attrs)
            for value, type in zip(node.results, types, strict=True):
                value.type = type
        return PassResult(changed, erased, {"collectives": erased})
