"""The pass ``roll-layers``: fold equal layers into one repeated layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from moecc.errors import InputError, Problem, nearest
from moecc.ir.graph import Graph
from moecc.ir.mesh import mesh_of
from moecc.ir.remat_names import DEFAULT, KEPT
from moecc.pipeline.passes import EXACT, Context, Pass, PassResult, Remark
from moecc.rewrite.match import NearMiss
from moecc.types.ranges import joined
from moecc_passes.roll_layers.fold import Fold, Keeping
from moecc_passes.roll_layers.hoist import data_dependent, hoist
from moecc_passes.roll_layers.layers import Layer, Repeated, difference, repetitions_in, stacks_of
from moecc_passes.roll_layers.wiring import wire

NO_LAYERS = NearMiss(
    "roll-layers",
    "the graph",
    "no two layers follow one another: locations like layers.3.ffn mark layers",
)


@dataclass(frozen=True)
class RollLayersPass(Pass):
    """Fold equal layers into one layer that is repeated.

    Before::

        param %layers.0.w : f32[mlp=8, embed=8] = source("layers.0.w" : f32[mlp=8, embed=8]) @layers.0.ffn
        param %layers.1.w : f32[mlp=8, embed=8] = source("layers.1.w" : f32[mlp=8, embed=8]) @layers.1.ffn
        %a = contract %x, %layers.0.w {over=embed} : f32[batch=B, mlp=8] @layers.0.ffn
        %b = add %x, %a : …
        %c = contract %b, %layers.1.w {over=embed} : f32[batch=B, mlp=8] @layers.1.ffn
        %d = add %b, %c : …

    After::

        param %layers.{0..1}.w : f32[layer=2, mlp=8, embed=8] = stack(source("layers.0.w" : …), …, axis=layer)
        %b = scan %x, %layers.{0..1}.w {over=(layer=2), carries=1, stacked=1} : … @layers {
          input %x : f32[batch=B, embed=8]
          input %layers.{0..1}.w : f32[mlp=8, embed=8]
          %a = contract %x, %layers.{0..1}.w {over=embed} : f32[batch=B, mlp=8] @layers.{0..1}.ffn
          %b = add %x, %a : …
          output b = %b
        }

    The size of the program no longer grows with the depth of the model.  Locations mark layers:
    ``layers.3.ffn`` belongs to the layer ``layers.3``.  A pattern may repeat every few layers, as one
    sparse layer in four does; encoder and decoder are two stacks.  What layers share is computed
    once, before them.  What differs from layer to layer, such as a random key, is stacked; so is
    what is used of each layer, such as a loss.  ``unroll-layers`` is the inverse.
    """  # noqa: E501

    name: ClassVar[str] = "roll-layers"
    summary: ClassVar[str] = "fold equal layers into one layer that is repeated"
    must_match: ClassVar[bool] = True
    takes_rolled: ClassVar[bool] = True
    preserves = EXACT

    remat: Annotated[
        Literal["none", "block", "full", "save"],
        "what is kept for the gradient: all, the operands of each block or layer, or named values",
    ] = "none"
    save: Annotated[
        tuple[str, ...], f"remat=save: names of {', '.join(KEPT)}; none: {', '.join(DEFAULT)}"
    ] = ()

    split: Annotated[
        str | None,
        "the mesh axis along which values carried from layer to layer are sharded",
    ] = None

    def validate(self) -> list[Problem]:
        """Return which names are unknown or have no effect."""
        if self.save and self.remat != "save":
            return [
                Problem("names are saved under remat=save alone", "save", found=self.remat,
                        hint="remat=save")
            ]  # fmt: skip
        return [
            Problem(f"nothing is called {name!r}", "save", ", ".join(KEPT),
                    hint=nearest(name, KEPT))
            for name in self.save
            if name not in KEPT
        ]  # fmt: skip

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Roll the layers that repeat; remark on them, and on why the rest was not rolled.

        Raises:
          InputError: `split` is not an axis of the graph's mesh.
        """
        self._check_split(graph)
        stats = {"scans": 0, "layers-rolled": 0, "layers-left": 0, "hoisted": 0}
        dependent, told = data_dependent(graph), list[Remark]()
        for layers in stacks_of(graph):
            stats["hoisted"] += hoist(layers, dependent)
            repeated = repetitions_in(layers)
            rest = list(_left(layers, repeated))
            reasons = [self._roll(graph, layers, r, ctx) for r in repeated]
            done = [r for r, why in zip(repeated, reasons, strict=True) if why is None]
            rest = [*(why for why in reasons if why is not None), *rest]
            for remark in rest:
                ctx.remark(remark)
            told += rest
            rolled = sum(r.stop - r.start for r in done)
            stats["scans"] += len(done)
            stats["layers-rolled"] += rolled
            stats["layers-left"] += len(layers) - rolled
        changed = stats["scans"] + stats["hoisted"] > 0
        misses = [NearMiss(self.name, r.where, r.text) for r in told] or [NO_LAYERS]
        near = [] if stats["scans"] else misses
        return PassResult(changed, stats["scans"], stats, near_misses=near)

    @property
    def _keeping(self) -> Keeping:
        return Keeping(self.remat, self.save, self.split)

    def _check_split(self, graph: Graph) -> None:
        if self.split is None:
            return
        mesh = mesh_of(graph)
        if mesh is None:
            raise InputError("the graph has no mesh", hint="annotate-sharding first")
        mesh.size((self.split,))

    def _roll(
        self, graph: Graph, layers: Sequence[Layer], found: Repeated, ctx: Context
    ) -> Remark | None:
        """Roll layers that repeat, or return a remark on why they cannot be rolled."""
        some = layers[found.start : found.stop]
        blocks = [
            [node for layer in some[i : i + found.period] for node in layer.nodes]
            for i in range(0, len(some), found.period)
        ]
        name = joined([layer.name for layer in some]) or some[0].stack
        try:
            Fold(graph, wire(blocks), some[0].stack).run(self._keeping)
        except InputError as error:
            return Remark(name, f"equal, but not rolled: {error.problems[0]}")
        each = f"{found.period} layers" if found.period > 1 else "one layer"
        ctx.remark(Remark(name, f"rolled: {each}, repeated {found.runs} times"))
        return None


def _left(layers: Sequence[Layer], repeated: Sequence[Repeated]) -> Iterator[Remark]:
    """Yield how each layer that is not repeated differs from its neighbour."""
    inside = {i for r in repeated for i in range(r.start, r.stop)}
    for at, layer in enumerate(layers):
        near = [i for i in (at + 1, at - 1) if 0 <= i < len(layers)]
        if at not in inside and near:
            other = next((layers[i] for i in near if i in inside), layers[near[0]])
            why = difference(layer, other)
            yield Remark(layer.name, f"not rolled with {other.name}: {why}")
