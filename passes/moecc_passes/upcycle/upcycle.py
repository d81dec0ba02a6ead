"""The pass ``upcycle``: dense feed-forward blocks become mixtures of experts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import Annotated, ClassVar, Literal

from moecc.analysis.ffn import FFNBlock, find_ffn_blocks
from moecc.errors import InputError, Problem
from moecc.ir.gates import convention
from moecc.ir.graph import Graph
from moecc.pipeline.passes import Context, Pass, PassResult, Preserves
from moecc.rewrite.match import NearMiss
from moecc_passes.routed import causal_values
from moecc_passes.upcycle.checks import problems, warnings
from moecc_passes.upcycle.contract import Contract, inexact_placement, of_blocks
from moecc_passes.upcycle.gates import GateLaw
from moecc_passes.upcycle.layers import choose
from moecc_passes.upcycle.recipes import factors_of, misfit, misrouted, recipe, router_std
from moecc_passes.upcycle.remarks import remarks
from moecc_passes.upcycle.rewrite import rewrite_block
from moecc_passes.upcycle.router_init import left_of_std
from moecc_passes.upcycle.scaling import is_scaled, shares

Gates = Literal[
    "renormalised", "top-k-softmax", "softmax", "sigmoid-renormalised", "sigmoid", "switch",
    "sparsemixer", "ones",
]  # fmt: skip
Routing = Literal["token-choice", "prototypes", "hash", "expert-choice", "soft"]


@dataclass(frozen=True)
class UpcyclePass(Pass):
    """Turn dense feed-forward blocks into mixtures of experts that compute the same function.

    Blocks are found by their dataflow.  Each of N experts gets a copy of the block, or with
    ``granularity=G`` one of its G slices; gates that add up to one give the dense block back.

    Before::

        %a = contract %n, %gate {over=embed} : f32[batch=B, seq=S, mlp=1536]
        %s = silu %a : …
        %u = contract %n, %up {over=embed} : …
        %m = mul %s, %u : …
        %y = contract %m, %down {over=mlp} : f32[batch=B, seq=S, embed=576]

    After ``upcycle{experts=8 top-k=2}``::

        %router = contract %n, %w {over=embed} : f32[batch=B, seq=S, expert=8]
        %e, %g = route %router {top_k=2} : i32[batch=B, seq=S, choice=2], f32[…]
        %p = place %e {tokens=(batch, seq), experts=8} : i32[batch=B, seq=S, choice=2]
        %x = dispatch %n, %e, %p : f32[group=1, expert=8, slot=ragged(%p), embed=576]
        %a = contract %x, %gate {over=embed} : f32[group=1, expert=8, slot=ragged(%p), mlp=1536]
        …
        %y = combine %o, %e, %p, %g : f32[batch=B, seq=S, embed=576]

    The lemmas behind its promise stand in ``docs/exactness.md``.
    """

    name: ClassVar[str] = "upcycle"
    summary: ClassVar[str] = "turn dense feed-forward blocks into mixtures of experts"
    must_match: ClassVar[bool] = True

    experts: Annotated[int, "N, the experts stored"] = 8
    top_k: Annotated[int, "k, the experts that a token goes to"] = 2
    layers: Annotated[
        str,
        "all, nowhere, every:N, first:N|half, last:N|half, middle:N, a list 3,7,11, or a glob",
    ] = "all"
    granularity: Annotated[int, "G, the slices of a block that make up one virtual group"] = 1
    shared: Annotated[float, "the share of the neurons that a shared expert keeps"] = 0.0
    gates: Annotated[
        Gates, "the gate convention; top-k-softmax, of the chosen, is renormalised by another name"
    ] = "renormalised"
    gate_scale: Annotated[float, "what the gates are multiplied by (routed scaling factor)"] = 1.0
    scale_placement: Annotated[
        Literal["down", "up-down", "cube-root"], "where the factor that gates ask for is put"
    ] = "down"
    init: Annotated[Literal["copy", "noise", "drop"], "how copies are made to differ"] = "copy"
    noise_std: Annotated[float, "init=noise: the standard deviation"] = 0.01
    noise: Annotated[
        Literal["relative", "absolute"], "init=noise: whether std is in units of the tensor's own"
    ] = "relative"
    drop_ratio: Annotated[float, "init=drop: the share of neurons drawn anew"] = 0.5
    router_init: Annotated[
        Literal["normal", "truncated-normal", "uniform", "zero", "logit-std", "switch"],
        "the router's weights; truncated-normal is cut at 3 std; logit-std: normal with the std "
        "router-std / √embed, so that the logits of a normalised input have router-std; switch: "
        "the same, cut at 2 std",
    ] = "normal"
    router_std: Annotated[float, "their standard deviation"] = 0.02
    slots: Annotated[Literal["ragged", "capacity"], "dropless, or a bound on rows an expert"] = (
        "ragged"
    )
    capacity_factor: Annotated[float, "slots=capacity: the capacity factor"] = 1.25
    groups: Annotated[int, "slots=capacity: the token groups that capacity counts in"] = 1
    routing: Annotated[
        Routing,
        "token-choice; prototypes: one expert from each of top-k groups (M6-T); hash: the token's "
        "id decides; and in encoders only expert-choice, where experts choose tokens, and soft, "
        "where they get averages of tokens",
    ] = "token-choice"
    balance_bias: Annotated[
        bool, "a bias [expert] that takes part in the choice alone, for loss-free balancing"
    ] = False
    soft_slots: Annotated[int, "routing=soft: the slots of an expert"] = 1
    decoder_layers: Annotated[
        str | None, "layers for the decoder of an encoder-decoder; none: as layers says"
    ] = None
    extra_ffn: Annotated[
        Literal["none", "before", "after"],
        "a dense sublayer beside each sparse one; adds 0 at first",
    ] = "none"
    expert_bias: Annotated[
        Literal["none", "multiplicative", "additive"],
        "a vector for each expert before its last matrix; ones or zeros at first",
    ] = "none"

    @cached_property
    def law(self) -> GateLaw:
        """The sum of the gates under these options."""
        return GateLaw(
            convention(self.gates).name, self.experts, self.top_k, self.granularity,
            self.gate_scale, has_prototypes=self.routing == "prototypes",
        )  # fmt: skip

    @property
    def preserves(self) -> Preserves:
        """What the options promise; `apply` adds what the model's width decides."""
        return self._contract(None).preserves

    def _contract(self, block: FFNBlock | None) -> Contract:
        logit_std = None if block is None else self._logit_std(block)
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
        )

    @property
    def is_bounded(self) -> bool:
        """Whether an expert takes a bounded number of rows."""
        return self.routing == "expert-choice" or self.slots == "capacity"

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

    def _logit_std(self, block: FFNBlock) -> float:
        if self._router_is_zero:
            return 0.0
        return router_std(self, block) * left_of_std(self.router_init) * sqrt(block.embed)

    def validate(self) -> list[Problem]:
        """Return what is wrong with the options, whatever the model."""
        return problems(self)

    def warnings(self) -> list[Problem]:
        """Return which options are unwise together."""
        return warnings(self)

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Convert the blocks that ``layers`` selects.

        Raises:
          InputError: a selected layer has no block to convert, or its width does not divide, or
            the routing does not suit its place; all problems at once.
        """
        search = find_ffn_blocks(graph)
        chosen = choose(search, self.layers, self.decoder_layers)
        causal = causal_values(graph)
        found = [misfit(self, b) or misrouted(self, graph, b, causal) for b in chosen]
        if any(found):
            raise InputError(p for p in found if p is not None)
        result = PassResult(changed=bool(chosen), matched=len(chosen))
        result.near_misses = [NearMiss("upcycle", r.loc, r.reason) for r in search.refusals]
        if search.blocks and not chosen:
            reason = f"layers={self.layers} selects none of its {len(search.blocks)} dense blocks"
            result.near_misses.append(NearMiss("upcycle", "the graph", reason))
        result.stats = {"blocks found": len(search.blocks), "blocks converted": len(chosen)}
        promises = []
        for block in chosen:
            promises.append(self._contract(block).preserves)
            rewrite_block(graph, block, recipe(self, block, ctx.seed))
        result.preserves = of_blocks(promises) if promises else None
        result.remarks = remarks(self, chosen)
        for remark in result.remarks:
            ctx.remark(remark)
        return result
