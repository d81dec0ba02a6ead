"""The pass ``upcycle``: dense feed-forward blocks become mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import isfinite, sqrt
from typing import Annotated, ClassVar, Literal

from moecc.analysis.ffn import FFNBlock, FFNSearch, find_ffn_blocks
from moecc.errors import InputError, Problem
from moecc.ir.graph import Graph
from moecc.pipeline.passes import Context, Pass, PassResult, Preserves, Remark
from moecc.rewrite.match import NearMiss
from moecc.weights.draws import derive_key
from moecc.weights.expr import Expr
from moecc_passes.routed import causal_values
from moecc_passes.upcycle.contract import Contract, inexact_placement, of_blocks
from moecc_passes.upcycle.gates import GateLaw
from moecc_passes.upcycle.layers import check_layers, select
from moecc_passes.upcycle.lift import Division, Drop, Noise, router_weight
from moecc_passes.upcycle.rewrite import Recipe, rewrite_block
from moecc_passes.upcycle.scaling import Factors, is_scaled, place_scale, shares
from moecc_passes.upcycle.sublayer import surroundings

Perturb = Callable[[str, Expr, Expr], Expr]
"""Makes copies differ: from a parameter's name, its dense weight, and its lifted weight."""

Gates = Literal[
    "renormalised", "softmax", "sigmoid-renormalised", "sigmoid", "switch", "sparsemixer", "ones"
]


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
    gates: Annotated[Gates, "the gate convention"] = "renormalised"
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
        Literal["normal", "truncated-normal", "uniform", "zero", "logit-std"],
        "the router's weights; logit-std: normal, so that the logits have std router-std",
    ] = "normal"
    router_std: Annotated[float, "their standard deviation"] = 0.02
    slots: Annotated[Literal["ragged", "capacity"], "dropless, or a bound on rows an expert"] = (
        "ragged"
    )
    capacity_factor: Annotated[float, "slots=capacity: the capacity factor"] = 1.25
    groups: Annotated[int, "slots=capacity: the token groups that capacity counts in"] = 1
    routing: Annotated[
        Literal["token-choice", "expert-choice"],
        "whether tokens choose experts, or experts tokens; the latter in encoders only",
    ] = "token-choice"
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
            self._route_gates, self.experts, self.top_k, self.granularity, self.gate_scale
        )

    @property
    def _route_gates(self) -> str:
        # Switch routing is the probability of the one expert chosen: softmax gates at top-1.
        return "softmax" if self.gates == "switch" else self.gates

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
            capacity_factor=self.capacity_factor if self._is_bounded else None,
        )

    @property
    def _experts_choose(self) -> bool:
        return self.routing == "expert-choice"

    @property
    def _is_bounded(self) -> bool:
        return self._experts_choose or self.slots == "capacity"

    def _inexact_placement(self, block: FFNBlock | None) -> str | None:
        scale = self.law.weight_scale
        if self.scale_placement != "cube-root" or scale == 1:
            return None
        if block is None:
            return inexact_placement(3, scale)
        if is_scaled(block, self._factors(block), scale):
            return None
        return inexact_placement(shares(block), scale)

    @property
    def _router_is_zero(self) -> bool:
        return self.router_init == "zero" or self.router_std == 0

    def validate(self) -> list[Problem]:
        """Return what is wrong with the options, whatever the model."""
        problems = [*self._impossible(), *self._out_of_range()]
        layers = check_layers(self.layers)
        decoder = check_layers(self.decoder_layers or "all")
        return [*problems, *(p for p in (layers, decoder) if p)]

    def _impossible(self) -> list[Problem]:
        n, k, g = self.experts, self.top_k, self.granularity
        found: list[Problem] = []
        if n < 2:
            found.append(Problem("a mixture has at least two experts", "experts", found=str(n)))
        if k > n or k < 1:
            found.append(
                Problem(
                    "top-k does not suit the experts", "top-k",
                    f"1 <= top-k <= experts={n}", str(k),
                    f"store more experts: experts={max(k, 2)}" if k > n else "top-k=1",
                )
            )  # fmt: skip
        if g < 1:
            found.append(Problem("granularity is at least 1", "granularity", found=str(g)))
        elif k % g or n % g:
            found.append(
                Problem(
                    "a token must go to whole virtual groups", "granularity",
                    f"G that divides top-k={k} and experts={n}", str(g),
                    f"top-k={-(-k // g) * g} experts={max(-(-n // g), -(-k // g)) * g} would do",
                )
            )  # fmt: skip
        if self.gates == "switch" and k != 1:
            found.append(
                Problem("switch routing has one expert a token", "gates", "top-k=1", f"top-k={k}",
                        "gates=softmax weighs several by their probabilities")
            )  # fmt: skip
        if self.gates == "sparsemixer" and k > 2:
            found.append(
                Problem("sparsemixer gates exist for one or two experts a token", "gates",
                        "top-k<=2", f"top-k={k}", "gates=renormalised takes any top-k")
            )  # fmt: skip
        if self.gates == "sparsemixer" and g > 1:
            found.append(
                Problem("sparsemixer gives the members of a virtual group different gates",
                        "gates", "granularity=1", f"granularity={g}",
                        "gates=renormalised suits any granularity")
            )  # fmt: skip
        return [*found, *self._against_expert_choice()] if self._experts_choose else found

    def _against_expert_choice(self) -> list[Problem]:
        """Return which options say something about choices that tokens do not make."""
        checks = (
            ("gates", self.gates == "renormalised", "gates=renormalised", self.gates),
            ("granularity", self.granularity == 1, "granularity=1", self.granularity),
            ("gate-scale", self.gate_scale == 1, "gate-scale=1.0", self.gate_scale),
        )
        return [
            Problem("where experts choose tokens, a token has no best experts", name, expected,
                    str(value), "routing=token-choice has this option")
            for name, fits, expected, value in checks if not fits
        ]  # fmt: skip

    def _out_of_range(self) -> list[Problem]:
        checks = (
            ("shared", 0 <= self.shared < 1, "0 <= shared < 1", self.shared),
            ("drop-ratio", 0 <= self.drop_ratio <= 1, "0 <= drop-ratio <= 1", self.drop_ratio),
            ("noise-std", self.noise_std >= 0, "noise-std >= 0", self.noise_std),
            ("router-std", self.router_std >= 0, "router-std >= 0", self.router_std),
            ("gate-scale", self.gate_scale > 0, "gate-scale > 0", self.gate_scale),
            ("groups", self.groups >= 1, "groups >= 1", self.groups),
            (
                "capacity-factor", not self._is_bounded or self.capacity_factor > 0,
                "capacity-factor > 0", self.capacity_factor,
            ),
        )  # fmt: skip
        return [
            Problem("an option is out of range", name, expected, str(found))
            for name, fits, expected, found in checks
            if not (fits and isfinite(found))
        ]

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Convert the blocks that ``layers`` selects.

        Raises:
          InputError: a selected layer has no block to convert, or its width does not divide; all
            problems at once.
        """
        search = find_ffn_blocks(graph)
        chosen = self._chosen(search)
        problems = [p for block in chosen if (p := self._misfit(block)) is not None]
        if self._experts_choose:
            causal = causal_values(graph)
            problems += [_looks_ahead(block) for block in chosen if block.x in causal]
        if problems:
            raise InputError(problems)
        result = PassResult(changed=bool(chosen), matched=len(chosen))
        result.near_misses = [NearMiss("upcycle", r.loc, r.reason) for r in search.refusals]
        result.stats = {"blocks found": len(search.blocks), "blocks converted": len(chosen)}
        promises = []
        for block in chosen:
            promises.append(self._contract(block).preserves)
            rewrite_block(graph, block, self._recipe(block, ctx.seed))
        result.preserves = of_blocks(promises) if promises else None
        result.remarks = self._remarks(chosen)
        for remark in result.remarks:
            ctx.remark(remark)
        return result

    def _chosen(self, search: FFNSearch) -> list[FFNBlock]:
        if self.decoder_layers is None:
            return select(search.blocks, self.layers, _layers(search))
        chosen: list[FFNBlock] = []
        for spec, is_decoder in ((self.layers, False), (self.decoder_layers, True)):
            part = FFNSearch(
                [b for b in search.blocks if b.loc.startswith("decoder") == is_decoder],
                [r for r in search.refusals if r.loc.startswith("decoder") == is_decoder],
            )
            chosen += select(part.blocks, spec, _layers(part))
        return chosen

    def _misfit(self, block: FFNBlock) -> Problem | None:
        """Return why the neurons of `block` do not divide as the options ask, or None."""
        shared = self.shared * block.width
        whole = round(shared)
        if self.shared and (abs(shared - whole) > 1e-6 or not 0 < whole < block.width):
            nearest = min(max(whole, 1), block.width - 1)
            return Problem(
                "the shared expert does not get a whole number of neurons, or leaves none",
                block.loc, f"shared={nearest / block.width:.10g}, say",
                f"{self.shared:g} of {block.width}",
            )  # fmt: skip
        routed = block.width - whole
        if routed % self.granularity:
            fits = [g for g in range(1, self.top_k + 1) if self._groups_fit(g, routed)]
            return Problem(
                f"the {routed} neurons do not divide into granularity={self.granularity} slices",
                block.loc, f"G among {', '.join(map(str, fits))}", str(self.granularity),
            )  # fmt: skip
        chosen = place_scale(block, self.scale_placement, self.law.weight_scale)
        if isinstance(chosen, str):
            hint = None if self.scale_placement == "down" else "scale-placement=down"
            return Problem(f"{chosen} (by {self.law.weight_scale:g})", block.loc, hint=hint)
        around = surroundings(block) if self.extra_ffn != "none" else None
        if isinstance(around, str):
            return Problem(
                f"no extra sublayer can stand beside the block: {around}", block.loc,
                hint="extra-ffn=none",
            )  # fmt: skip
        return None

    def _groups_fit(self, slices: int, neurons: int) -> bool:
        return not (neurons % slices or self.top_k % slices or self.experts % slices)

    def _division(self, block: FFNBlock) -> Division:
        shared = round(self.shared * block.width)
        return Division(
            inner=block.inner,
            shared=shared,
            slices=self.granularity,
            copies=self.experts // self.granularity,
            width=(block.width - shared) // self.granularity,
        )

    def _factors(self, block: FFNBlock) -> Factors:
        chosen = place_scale(block, self.scale_placement, self.law.weight_scale)
        assert not isinstance(chosen, str), "checked before anything was changed"
        return chosen

    def _recipe(self, block: FFNBlock, seed: int) -> Recipe:
        division = self._division(block)
        factors = dict(self._factors(block))
        if block.output_bias is not None:
            factors[block.output_bias] = self.law.bias_scale
        kind = "normal" if self.router_init == "logit-std" else self.router_init
        outer = block.x.type[block.outer]
        key = derive_key(seed, f"{_place(block)}/router")
        slots: dict[str, object] = {"slots": self.slots}
        if self._is_bounded:
            slots |= {"capacity_factor": self.capacity_factor, "groups": self.groups}
        return Recipe(
            division=division,
            router=router_weight(kind, self._router_std(block), outer, division, key=key),
            top_k=self.top_k,
            gates=self._route_gates,
            gate_scale=self.gate_scale,
            factors=factors,
            perturb=self._perturb(block, division, seed),
            slots=slots,
            expert_bias=self.expert_bias,
            extra_ffn=self.extra_ffn,
            experts_choose=self._experts_choose,
        )

    def _perturb(self, block: FFNBlock, division: Division, seed: int) -> Perturb:
        if self.init == "noise":
            return Noise(self.noise_std, self.noise == "relative", seed, _place(block)).apply
        if self.init == "drop":
            return Drop(self.drop_ratio, seed, _place(block), division).apply
        return _unperturbed

    def _router_std(self, block: FFNBlock) -> float:
        # After a norm the router's input has unit mean square, up to the norm's own scale.
        is_of_logits = self.router_init == "logit-std"
        return self.router_std / sqrt(block.embed) if is_of_logits else self.router_std

    def _logit_std(self, block: FFNBlock) -> float:
        return 0.0 if self._router_is_zero else self._router_std(block) * sqrt(block.embed)

    def _remarks(self, blocks: list[FFNBlock]) -> list[Remark]:
        how = "which choose tokens" if self._experts_choose else f"top-{self.top_k}"
        remarks = [Remark(b.loc, f"became {self.experts} experts, {how}") for b in blocks]
        if not self._experts_choose and self.top_k == 1 and self.gates == "renormalised":
            remarks.append(
                Remark("", "top-1 with renormalised gates: the gate is always 1, so the router "
                           "gets no gradient from the loss; gates=switch or top-k=2 trains it")
            )  # fmt: skip
        if self.router_init == "zero":
            remarks.append(
                Remark("", "a zero router sends every token to the first experts, and ties last "
                           "until something breaks them; use it to check, not to train")
            )  # fmt: skip
        if self.experts & (self.experts - 1):
            remarks.append(Remark("", "some runtimes want a power of two of experts"))
        return remarks


def _place(block: FFNBlock) -> str:
    """Return what the draws of a block are keyed by; the location alone may not be the only one."""
    return f"{block.loc}/{block.down.operands[1].name}"


def _looks_ahead(block: FFNBlock) -> Problem:
    return Problem(
        "expert choice in a decoder decides about a token by later ones", block.loc,
        hint="routing=token-choice, or decoder-layers=nowhere",
    )  # fmt: skip


def _unperturbed(name: str, dense: Expr, experts: Expr) -> Expr:
    return experts


def _layers(search: FFNSearch) -> int:
    """Return the number of layers, counted from the highest number that a location has."""
    numbers = [b.layer for b in search.blocks if b.layer is not None]
    sparse = [n for r in search.refusals if (n := r.layer) is not None]
    return max([*numbers, *sparse], default=len(search.blocks) - 1) + 1
