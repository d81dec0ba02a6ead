"""Sharding of the values carried between iterations, along a mesh axis that replicates them.

Under rematerialisation the stream between two layers is all that is kept, and devices that share
the neurons of a layer all replicate it.  Sharded, it takes a fraction of the memory, for one
gather per iteration (Rajbhandari et al. 2019, §6.1: partitioned activations).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moecc.ir.graph import Graph, Node, Value
from moecc.ir.mesh import mesh_of
from moecc.types.tensor import TensorType

ORIGIN = "roll-layers/split"


@dataclass(frozen=True)
class Cuts:
    """Shards values along one mesh axis, and gathers them again.

    Attributes:
      graph: a graph on a mesh that has the axis.
      mesh: the axis; None leaves everything unchanged.
      loc: the location of the new nodes.
    """

    graph: Graph
    mesh: str | None
    loc: str

    def type(self, type: TensorType) -> TensorType:
        """Return `type` with its largest replicated axis sharded."""
        at = self._axis(type)
        if at is None:
            return type
        axes = list(type.axes)
        axes[at] = replace(axes[at], mesh=(*axes[at].mesh, self.mesh or ""))
        return type.with_axes(axes)

    def cut(self, value: Value, graph: Graph, before: Node | None = None) -> Value:
        """Return `value` sharded: each device keeps its shard."""
        return self._moved("shard", self._axis(value.type), value, graph, before)

    def joined(
        self, value: Value, whole: TensorType, graph: Graph, before: Node | None = None
    ) -> Value:
        """Return `value` gathered again, as it was before it was cut."""
        return self._moved("all_gather", self._axis(whole), value, graph, before)

    def _moved(
        self, op: str, at: int | None, value: Value, graph: Graph, before: Node | None
    ) -> Value:
        if at is None:
            return value
        attrs = {"axis": value.type.axes[at].name, "mesh": (self.mesh,)}
        made = graph.append(
            op, [value], attrs, names=[graph.fresh(value.name)], loc=self.loc, origin=ORIGIN,
            before=before,
        )  # fmt: skip
        return made.result

    def _axis(self, type: TensorType) -> int | None:
        """Return the axis to shard, the largest that divides; None if there is none."""
        if self.mesh is None or type.dtype.kind != "float" or type.unreduced:
            return None
        if any(self.mesh in a.mesh for a in type.axes):
            return None
        grid = mesh_of(self.graph)
        assert grid is not None, "checked by the pass"
        sizes = {
            i: a.size
            for i, a in enumerate(type.axes)
            if isinstance(a.size, int) and a.size % grid.size((*a.mesh, self.mesh)) == 0
        }
        return max(sizes, key=lambda i: sizes[i], default=None)
