"""The pass ``expert-parallel``: how the rows of routed layers come to their experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from moecc.errors import InputError, Problem
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph
from moecc.ir.mesh import mesh_of
from moecc.pipeline.passes import EXACT, Context, Pass, PassResult, Preserves, Remark
from moecc_passes.sharding.experts.exchange import exchange
from moecc_passes.sharding.experts.gather import gather_tokens
from moecc_passes.sharding.experts.layer import LaidLayer, laid_layers, need

NAME = "expert-parallel"
EXCHANGES = ("capacity", "ragged", "hierarchical")


@dataclass(frozen=True)
class ExpertParallelPass(Pass):
    """Choose the collectives between the tokens and the experts of every routed layer.

    capacity: an ``all_to_all`` of slots there and back.  ragged: a ``ragged_all_to_all`` of the
    rows that are there.  hierarchical: the experts lie on two mesh axes, and rows cross the inner
    one first.  ring: tokens are gathered and routed again, results reduce-scattered; exact, and
    cheaper where tokens have many choices.  replicated: the same with an ``all_reduce``, for
    tokens that are the same along the experts' mesh axis, as when decoding.

    Before, as ``annotate-sharding`` leaves it::

        %r = dispatch %x, %e, %p : f32[group@data=8, expert=8, slot=capacity(%p), embed=16]
        %r1 = reshard %r {to="expert@data"} : f32[group=8, expert@data=8, …]

    After ``expert-parallel{via=capacity slice=model}``, the sequence of ST-MoE::

        %x1 = shard %x {axis=embed, mesh=model} : f32[batch@data=B, seq=S, embed@model=16]
        %r = dispatch %x1, %e, %p : f32[group@data=8, expert=8, slot=capacity(%p), embed@model=16]
        %r1 = all_to_all %r {mesh=data, split=expert, gather=group} : f32[group=8, expert@data=8, …]
        %r2 = all_gather %r1 {axis=embed, mesh=model} : f32[group=8, expert@data=8, …, embed=16]
    """

    name: ClassVar[str] = NAME
    summary: ClassVar[str] = "choose how rows come to the devices of their experts"
    must_match: ClassVar[bool] = True

    via: Annotated[
        Literal["capacity", "ragged", "hierarchical", "ring", "replicated"],
        "the collectives between tokens and experts",
    ]
    slice: Annotated[
        str | None, "the mesh axis along which copies send a part of each row (capacity, ragged)"
    ] = None

    @property
    def preserves(self) -> Preserves:
        """Collectives are the identity on the global value."""
        return EXACT

    def validate(self) -> list[Problem]:
        """Return which options do not go together."""
        if self.slice is None or self.via in EXCHANGES:
            return []
        expected = f"one of {', '.join(EXCHANGES)}"
        return [Problem("rows are sliced where they are exchanged", "slice", expected, self.via)]

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Insert the collectives.

        Raises:
          InputError: the graph lies on no mesh, or a layer does not suit the option.
        """
        mesh = mesh_of(graph)
        if mesh is None:
            raise InputError("the graph lies on no mesh", hint="annotate-sharding first")
        if self.slice is not None:
            mesh.size((self.slice,))
        layers = laid_layers(graph)
        for layer in layers:
            self._apply(graph, layer)
        if layers:
            where = layers[0].routed.name
            ctx.remark(Remark(where, f"{len(layers)} layers: {self.via} over "
                              f"{'*'.join(layers[0].expert_mesh)}"))  # fmt: skip
        return PassResult(bool(layers), len(layers), {"layers": len(layers)})

    def _apply(self, graph: Graph, layer: LaidLayer) -> None:
        builder = Builder(graph, loc=layer.routed.dispatch.loc, origin=f"{NAME}/{self.via}")
        if self.via in EXCHANGES:
            self._check_exchange(layer)
            exchange(graph, layer, builder, self.slice)
            return
        need(self.via == "replicated" or bool(layer.exchanged), layer,
             "tokens do not lie on the experts' mesh axis, so there is no ring",
             "a mesh axis that both lie on", "via=replicated")  # fmt: skip
        gather_tokens(graph, layer, builder, scatter=self.via == "ring")

    def _check_exchange(self, layer: LaidLayer) -> None:
        need(set(layer.exchanged) == set(layer.expert_mesh), layer,
             "rows are exchanged along mesh axes that both tokens and experts lie on",
             "tokens on the mesh axes of the experts, too", "via=replicated")  # fmt: skip
        ragged = layer.is_ragged
        need(self.via != "capacity" or not ragged, layer,
             "rows without a bound have no fixed room", "slots=capacity", "via=ragged")  # fmt: skip
        need(self.via != "ragged" or ragged, layer,
             "rows under a capacity are not ragged", "slots=ragged", "via=capacity")  # fmt: skip
        if self.via == "hierarchical":
            tokens, experts = layer.exchanged, layer.expert_mesh
            need(len(experts) >= 2 and tokens == experts[::-1], layer,
                 "a hierarchical exchange crosses mesh axes one by one",
                 "tokens on far*near, experts on near*far",
                 "rules=expert-hierarchical mesh=far:2,near:4")  # fmt: skip
