"""The pass ``expert-parallel``: how the rows of routed layers come to their experts."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Annotated, ClassVar, Literal

from moecc.errors import InputError, Problem
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph
from moecc.ir.mesh import mesh_of
from moecc.pipeline.passes import EXACT, Context, Pass, PassResult, Preserves, Remark
from moecc.sharding.legal import refusals
from moecc.sharding.vias import BY_NAME, WAYS, Slots
from moecc_passes.sharding.experts.bound import bound_rows
from moecc_passes.sharding.experts.chunked import chunk_rows
from moecc_passes.sharding.experts.exchange import exchange
from moecc_passes.sharding.experts.gather import gather_tokens
from moecc_passes.sharding.experts.layer import LaidLayer, laid_layers, need

NAME = "expert-parallel"
CHUNKED = Preserves("reassociation", "rows are multiplied a chunk at a time")
EXCHANGES = tuple(way.name for way in WAYS if way.exchanges_rows)


@dataclass(frozen=True)
class ExpertParallelPass(Pass):
    """Choose the collectives between the tokens and the experts of every routed layer.

    capacity: an ``all_to_all`` of slots there and back.  ragged: a ``ragged_all_to_all`` of the
    rows that are there.  hierarchical: two mesh axes shard the experts, and rows cross the inner
    one first.  ring: tokens are gathered and routed again, results reduce-scattered; exact, and
    cheaper where tokens have many choices.  replicated: the same with an ``all_reduce``, for
    tokens that are the same along the experts' mesh axis, as when decoding.

    With chunks, experts work on one part of the token groups while the next is on its way.

    A buffer factor bounds what a device receives: what it has no room for gets no slot, so that
    no exchange loses anything, and an output ``dropped.LAYER`` counts it.

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

    buffer_factor: Annotated[
        float | None,
        "the rows that a device has room for, in shares of the choices (ragged, ring, replicated)",
    ] = None

    chunks: Annotated[
        int, "the chunks of rows that experts work on in turn (capacity, hierarchical)"
    ] = 1

    @property
    def preserves(self) -> Preserves:
        """Collectives are the identity on the global value; a bounded buffer may lose rows."""
        if self.buffer_factor is None:
            return EXACT if self.chunks == 1 else CHUNKED
        reason = f"rows beyond {self.buffer_factor:g} times a device's share are dropped"
        return Preserves("approximate", reason)

    def validate(self) -> list[Problem]:
        """Return which options do not go together."""
        found: list[Problem] = []
        if self.slice is not None and self.via not in EXCHANGES:
            expected = f"one of {', '.join(EXCHANGES)}"
            what = "rows are sliced where they are exchanged"
            found.append(Problem(what, "slice", expected, self.via))
        factor = self.buffer_factor
        if factor is not None and not 0 < factor < inf:
            what = "a buffer has room for something"
            found.append(Problem(what, "buffer-factor", "a positive number", str(factor)))
        if factor is not None and BY_NAME[self.via].is_bounded:
            what = "a capacity bounds every buffer already"
            found.append(Problem(what, "buffer-factor", "another way", "via=capacity"))
        if self.chunks < 1 or (self.chunks > 1 and not BY_NAME[self.via].is_chunked):
            what = "rows of a fixed number are exchanged in chunks"
            expected = "at least 1, and capacity or hierarchical"
            found.append(Problem(what, "chunks", expected, f"{self.chunks}, via={self.via}"))
        return found

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Insert the collectives.

        Raises:
          InputError: the graph has no mesh, or a layer does not suit the option.
        """
        mesh = mesh_of(graph)
        if mesh is None:
            raise InputError("the graph has no mesh", hint="annotate-sharding first")
        if self.slice is not None:
            mesh.size((self.slice,))
        layers = laid_layers(graph)
        for layer in layers:
            self._apply(graph, layer)
        # The layers are other nodes now.
        for layer in laid_layers(graph) if self.buffer_factor is not None else []:
            builder = Builder(graph, loc=layer.routed.dispatch.loc, origin=f"{NAME}/buffer")
            bound_rows(graph, layer, builder, mesh, self.buffer_factor or 1.0)
        for layer in laid_layers(graph) if self.chunks > 1 else []:
            builder = Builder(graph, loc=layer.routed.dispatch.loc, origin=f"{NAME}/chunks")
            chunk_rows(graph, layer, builder, mesh, self.chunks)
        if layers:
            where = layers[0].routed.name
            ctx.remark(Remark(where, f"{len(layers)} layers: {self.via} over "
                              f"{'*'.join(layers[0].expert_mesh)}"))  # fmt: skip
        return PassResult(bool(layers), len(layers), {"layers": len(layers)})

    def _apply(self, graph: Graph, layer: LaidLayer) -> None:
        builder = Builder(graph, loc=layer.routed.dispatch.loc, origin=f"{NAME}/{self.via}")
        way = BY_NAME[self.via]
        slots: Slots = "ragged" if layer.is_ragged else "fixed"
        for refusal in refusals(way, layer.token_mesh, layer.expert_mesh, slots):
            need(False, layer, refusal.what, refusal.expected, refusal.hint)
        if way.exchanges_rows:
            exchange(graph, layer, builder, self.slice)
        else:
            gather_tokens(graph, layer, builder, way)
