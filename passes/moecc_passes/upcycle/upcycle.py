"""The pass ``upcycle``: convert dense feed-forward blocks to mixtures of experts."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

from moecc.analysis.ffn import FFNBlock, find_ffn_blocks
from moecc.errors import InputError, Problem
from moecc.ir.graph import Graph
from moecc.pipeline.passes import Context, Pass, PassResult, Preserves, ReadWeight
from moecc.rewrite.driver import may_rewrite
from moecc.rewrite.match import NearMiss
from moecc.weights.branches import BASE
from moecc_passes.routed import causal_values
from moecc_passes.upcycle.checks import problems, unknown_models, warnings
from moecc_passes.upcycle.contract import Contract, inexact_placement, of_blocks
from moecc_passes.upcycle.fitted_router import missing, unread
from moecc_passes.upcycle.layers import choose
from moecc_passes.upcycle.lints import lints
from moecc_passes.upcycle.options import UpcycleOptions
from moecc_passes.upcycle.recipes import factors_of, misfit, misrouted, recipe, router_std
from moecc_passes.upcycle.remarks import remarks
from moecc_passes.upcycle.rewrite import average_rest, rewrite_block
from moecc_passes.upcycle.router_init import left_of_std
from moecc_passes.upcycle.router_input import input_rms
from moecc_passes.upcycle.scaling import is_scaled, shares


@dataclass(frozen=True)
class UpcyclePass(UpcycleOptions, Pass):
    """Turn dense feed-forward blocks into mixtures of experts that compute the same function.

    Blocks are found by their dataflow.  Each of N experts gets a copy of the block, or with
    ``granularity=G`` one of its G slices; gates that add up to one give the dense block back.
    With ``split`` each neuron is stored once, and a token gets k of N parts of the block.

    Before::

        %a = contract %n, %gate {over=embed} : f32[batch=B, seq=S, mlp=1536]
        %s = silu %a : …
        %u = contract %n, %up {over=embed} : …
        %m = mul %s, %u : …
        %y = contract %m, %down {over=mlp} : f32[batch=B, seq=S, embed=576]

    After ``upcycle{experts=8 top-k=2}``::

        %router = contract %n, %w {over=embed} : f32[batch=B, seq=S, expert=8]
        %e, %g = route %router {top_k=2} : i32[batch=B, seq=S, choice=2], f32[…]
        %p = assign_slots %e {tokens=(batch, seq), experts=8} : i32[batch=B, seq=S, choice=2]
        %x = dispatch %n, %e, %p : f32[group=1, expert=8, slot=ragged(%p), embed=576]
        %a = contract %x, %gate {over=embed} : f32[group=1, expert=8, slot=ragged(%p), mlp=1536]
        …
        %y = combine %o, %e, %p, %g : f32[batch=B, seq=S, embed=576]

    The lemmas behind its promise are in ``docs/exactness.md``.
    """

    name: ClassVar[str] = "upcycle"
    summary: ClassVar[str] = "turn dense feed-forward blocks into mixtures of experts"
    must_match: ClassVar[bool] = True

    @property
    def preserves(self) -> Preserves:
        """The promise of the options; `apply` refines it by the model's width."""
        return self._contract(None, None).preserves

    def _contract(self, block: FFNBlock | None, read: ReadWeight | None) -> Contract:
        logit_std = None if block is None or read is None else self._logit_std(block, read)
        return Contract(
            law=self.law,
            logit_std=0.0 if self._router_is_zero else logit_std,
            drop=self.drop_ratio if self.init == "drop" else 0.0,
            noise=self.noise_std if self.init == "noise" else 0.0,
            noise_is_relative=self.noise == "relative",
            matrices=3 if block is None else len(block.ups) + 1,
            shared=self.shared,
            placement=self._inexact_placement(block),
            capacity_factor=self.capacity_factor if self.is_bounded else None,
            is_soft=self.routing == "soft",
            parts=self._parts,
            models=tuple(dict.fromkeys(self.models)) if set(self.models) != {BASE} else (),
        )

    @property
    def _parts(self) -> tuple[int, int] | None:
        """The parts of a block that a token gets, and all, where that is not all of the block."""
        is_whole = self.top_k == self.experts and (self._router_is_zero or self.gates == "ones")
        return (self.top_k, self.experts) if self.is_split and not is_whole else None

    def _inexact_placement(self, block: FFNBlock | None) -> str | None:
        scale = self.law.weight_scale
        if self.scale_placement != "cube-root" or scale == 1:
            return None
        if block is None:
            return inexact_placement(3, scale)
        if is_scaled(block, factors_of(self, block), scale):
            return None
        return inexact_placement(shares(block), scale)

    @property
    def _router_is_zero(self) -> bool:
        return self.router_init == "zero" or self.router_std == 0

    def _logit_std(self, block: FFNBlock, read: ReadWeight) -> float:
        if self._router_is_zero:
            return 0.0
        std = router_std(self, block) * left_of_std(self.router_init) * sqrt(block.embed)
        # Equal copies under gates with a constant sum are exact for any logits.
        is_exact = self.law.is_constant and self.init == "copy"
        return std if is_exact else std * input_rms(block, read)

    def validate(self) -> list[Problem]:
        """Return the problems of the options, independent of the model."""
        return problems(self)

    def warnings(self) -> list[Problem]:
        """Return warnings of unwise combinations of options."""
        return warnings(self)

    def lints(self) -> list[Problem]:
        """Return what the paper advises against."""
        return lints(self)

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Convert the blocks that ``layers`` selects.

        Raises:
          InputError: a selected layer has no block to convert, or its width does not divide, or
            the routing is not possible there; all problems at once.
        """
        search = find_ffn_blocks(graph)
        chosen = choose(search, self.layers, self.decoder_layers)
        causal = causal_values(graph)
        found = [
            misfit(self, b) or misrouted(self, graph, b, causal)
            or missing(self, b, ctx.statistics) for b in chosen
        ]  # fmt: skip
        unknown = [*unknown_models(self, ctx.models), *unread(self, ctx.statistics)]
        if any(found) or unknown:
            raise InputError([*unknown, *(p for p in found if p is not None)])
        result = PassResult(changed=bool(chosen), matched=len(chosen))
        result.near_misses = [NearMiss("upcycle", r.loc, r.reason) for r in search.refusals]
        if search.blocks and not chosen:
            reason = f"layers={self.layers} selects none of its {len(search.blocks)} dense blocks"
            result.near_misses.append(NearMiss("upcycle", "the graph", reason))
        result.stats = {"blocks found": len(search.blocks), "blocks converted": len(chosen)}
        promises = []
        texts = () if ctx.statistics is None else tuple(ctx.statistics.texts)
        for block in chosen:
            if not may_rewrite(self.name, block.loc):
                break
            if ctx.promises:
                promises.append(self._contract(block, ctx.read).preserves)
            rewrite_block(graph, block, recipe(self, block, ctx.seed, texts))
        if chosen and self.rest == "mean":
            average_rest(graph, self.models)
        result.preserves = of_blocks(promises) if promises else None
        result.remarks = remarks(self, chosen)
        for remark in result.remarks:
            ctx.remark(remark)
        return result
