"""The pass ``specialize``: a graph for training or evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

from moecc.errors import InputError, Problem
from moecc.ir.graph import Graph
from moecc.ir.structure import fingerprint
from moecc.pipeline.passes import EXACT, Context, Pass, PassResult, Preserves
from moecc.rewrite.match import NearMiss
from moecc_passes.add_losses import remove_losses
from moecc_passes.routed import NOTHING_ROUTED, RoutedLayer, causal_values, routed_layers
from moecc_passes.specialize import checks
from moecc_passes.specialize.dropout import drop
from moecc_passes.specialize.layer import Keys, specialise
from moecc_passes.specialize.lints import lints
from moecc_passes.specialize.mode_config import ModeConfig, recorded
from moecc_passes.specialize.options import SpecializeOptions
from moecc_passes.specialize.remarks import remarks
from moecc_passes.specialize.undo import undo


@dataclass(frozen=True)
class SpecializePass(SpecializeOptions, Pass):
    """Set the capacity, the policy and the noise of training or evaluation on the routed layers.

    Weights stay as they are, so one checkpoint serves any capacity factor.  An option that is not
    given is what the graph's attribute ``routing`` says for the mode (the pass ``st-moe`` writes
    it), and what the layer has where that says nothing.  What an earlier specialisation added is
    taken back first, and losses and metrics are made anew.  Random numbers come from one input,
    ``key``.

    Before::

        %p = assign_slots %e {tokens=(batch, seq), experts=8} : i32[batch=B, seq=S, choice=2]

    After ``specialize{mode=train capacity-factor=1.25 policy=random}``::

        %u = random_uniform %k, %g : f32[batch=B, seq=S, choice=2]
        %s = keep_choices %g, %u : pred[batch=B, seq=S, choice=2]
        %p = assign_slots %e, %s {…, slots=capacity, capacity_factor=1.25, using=keep} : i32[…]
    """

    name: ClassVar[str] = "specialize"
    summary: ClassVar[str] = "set capacity, policy and noise for training or evaluation"
    must_match: ClassVar[bool] = True

    @property
    def preserves(self) -> Preserves:
        """What is dropped depends on the routing; `apply` is more precise."""
        return Preserves("approximate", "capacity, policy and noise decide what experts see")

    def validate(self) -> list[Problem]:
        """Return which options are out of range or contradict each other."""
        return checks.problems(self)

    def validate_after(self, earlier: Sequence[Pass]) -> list[Problem]:
        """Return contradictions with an earlier conversion."""
        return list(checks.problems_after(self, earlier))

    def lints(self) -> list[Problem]:
        """Return what the paper would not do in training."""
        return lints(self)

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Specialise every routed layer.

        Raises:
          InputError: a layer of a decoder would see later tokens, or does not support the options.
        """
        before = fingerprint(graph)
        losses = remove_losses(graph)
        undo(graph, self.covers)
        settings = ModeConfig.of(self).over(recorded(graph, self.mode))
        layers = self._layers(graph)
        causal = causal_values(graph)
        is_decoder = {y.name: y.dispatch.operands[0] in causal for y in layers}
        problems = [
            p for y in layers for p in checks.misfits(self, y, settings, is_decoder[y.name])
        ]
        if problems:
            raise InputError(problems)
        stats = self._specialise(graph, layers, settings)
        if layers:
            graph.attrs["mode"] = self.mode
        for remark in remarks(self._layers(graph), settings, is_decoder, self.mode):
            ctx.remark(remark)
        if losses is not None:
            # They read capacity and policy, so they are computed again.
            losses.apply(graph, ctx)
        result = PassResult(fingerprint(graph) != before, len(layers), stats)
        result.near_misses = [] if layers else [self._near_miss(graph)]
        result.preserves = self.preserves if result.changed else EXACT
        return result

    def covers(self, loc: str) -> bool:
        """Return whether the option ``layers`` selects the location `loc`."""
        return self.layers == "all" or fnmatchcase(loc, self.layers)

    def _layers(self, graph: Graph) -> list[RoutedLayer]:
        return [y for y in routed_layers(graph) if self.covers(y.assigner.loc)]

    def _near_miss(self, graph: Graph) -> NearMiss:
        routed = routed_layers(graph)
        if not routed:
            return NOTHING_ROUTED
        places = f"{routed[0].name} … {routed[-1].name}"
        return NearMiss("specialize", "the graph", f"layers={self.layers} names none of {places}")

    def _specialise(
        self, graph: Graph, layers: list[RoutedLayer], settings: ModeConfig
    ) -> dict[str, int]:
        keys, dropped = Keys(graph), 0
        for layer in layers:
            specialise(layer, settings.at(layer.assigner.loc), keys)
        if settings.padding_mask is False:
            _erase_unused_masks(graph)
        if settings.dropout and layers:
            dropped = drop(graph, settings.dropout, keys, self.covers)
        return {"layers": len(layers), "keys": keys.count, "dropouts": dropped}


def _erase_unused_masks(graph: Graph) -> None:
    for name in ("mask", "decoder_mask"):
        if name in graph.inputs and not graph.inputs[name].users:
            graph.erase_input(name)
