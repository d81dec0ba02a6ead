"""The pass ``strip-sharding``: the graph as it was before it was sharded."""

from __future__ import annotations

from dataclasses import dataclass

from moecc.ir.graph import Graph, Node
from moecc.ir.mesh import mesh_of, set_mesh
from moecc.ir.structure import replace_value
from moecc.rewrite.passes import EXACT, Context, Pass, PassResult
from moecc_passes.sharding.expert_parallel import REGROUPED, restore_groups, unchunk

REPEATING = "expert-parallel/"
"""The origin of routing that was done again on gathered tokens."""


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

    name = "strip-sharding"
    summary = "take the mesh and its collectives away"
    takes_rolled = True
    preserves = REGROUPED

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Erase the collectives, and make every type one of global values alone."""
        erased = 0
        for node in list(graph.every_node()):
            if node.op.collective is not None:
                node.replace_by(node.operands[0])
                erased += 1
        changed = mesh_of(graph) is not None or erased > 0
        regrouped = restore_groups(graph)
        _take_away(graph)
        again = _merge_repeated(graph)
        joined = unchunk(graph)
        stats = {"collectives": erased, "repeated": again, "unchunked": joined}
        preserved = REGROUPED if regrouped or joined else EXACT
        return PassResult(changed, erased, stats, preserves=preserved)


def _take_away(graph: Graph) -> None:
    """Take the mesh away from `graph` and its bodies, and from all types."""
    set_mesh(graph, None)
    for value in (*graph.inputs.values(), *graph.params.values()):
        value.type = value.type.bare
    for node in graph:
        if node.body is not None:
            _take_away(node.body)
        types = node.op.result_types(node.operands, node.attrs)
        for value, type in zip(node.results, types, strict=True):
            value.type = type


def _merge_repeated(graph: Graph) -> int:
    """Merge what ``expert-parallel`` did again with what it repeats; return how often."""
    seen: dict[object, Node] = {}
    merged = 0
    for node in list(graph):
        key = (node.op.name, *node.operands, *sorted(node.attrs.items()))
        first = seen.setdefault(key, node)
        if first is not node and node.origin.startswith(REPEATING):
            for value, repeated in zip(node.results, first.results, strict=True):
                replace_value(value, repeated)
            node.erase()
            merged += 1
    return merged
