"""The recipe of a block from the options of ``upcycle``, and why a block is rejected."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

from moecc.analysis.ffn import FFNBlock
from moecc.errors import Problem
from moecc.ir.graph import Graph, Value
from moecc.ir.moe import SlotOptions
from moecc.weights.draws import derive_key
from moecc.weights.expr import Expr
from moecc_passes.inputs import is_decoder, token_ids
from moecc_passes.upcycle.fitted_router import fitted_weight, neuron_order
from moecc_passes.upcycle.lift import Division, Drop, Noise
from moecc_passes.upcycle.options import UpcycleOptions
from moecc_passes.upcycle.rewrite import Perturb, Recipe
from moecc_passes.upcycle.router_init import router_weight, slot_weight
from moecc_passes.upcycle.routers import LOOKS_AHEAD, NAMES, Router
from moecc_passes.upcycle.scaling import Factors, scale_factors
from moecc_passes.upcycle.sublayer import surroundings

DRAWN = {"logit-std": "normal", "switch": "switch"}
"""The initialisations whose ``router-std`` is that of the logits."""


def misfit(item: UpcycleOptions, block: FFNBlock) -> Problem | None:
    """Return why `block` cannot be divided or scaled as the options require, or None."""
    shared = item.shared * block.width
    whole = round(shared)
    if item.shared and (abs(shared - whole) > 1e-6 or not 0 < whole < block.width):
        nearest = min(max(whole, 1), block.width - 1)
        return Problem(
            "the shared expert does not get a whole number of neurons, or leaves none",
            block.loc, f"shared={nearest / block.width:.10g}, say",
            f"{item.shared:g} of {block.width}",
        )  # fmt: skip
    padding = item.padding(block.width, whole)
    if padding > block.width:
        return Problem(
            "more neurons would be added than there are", block.loc,
            f"at most {block.width}", str(padding), "a smaller pad, or fewer slices",
        )  # fmt: skip
    routed = block.width + padding - whole
    if item.is_split and routed % item.experts:
        return Problem(
            f"the {routed} neurons do not divide into parts", block.loc,
            f"a divisor of {routed}", f"experts={item.experts}", "pad=1 adds some that add nothing",
        )  # fmt: skip
    if routed % item.granularity:
        fits = [g for g in range(1, item.top_k + 1) if _groups_fit(item, g, routed)]
        return Problem(
            f"the {routed} neurons do not divide into granularity={item.granularity} slices",
            block.loc, f"G among {', '.join(map(str, fits))}", str(item.granularity),
            "pad=1 adds neurons that add nothing",
        )  # fmt: skip
    chosen = scale_factors(block, item.scale_placement, item.law.weight_scale)
    if isinstance(chosen, str):
        hint = None if item.scale_placement == "down" else "scale-placement=down"
        return Problem(f"{chosen} (by {item.law.weight_scale:g})", block.loc, hint=hint)
    around = surroundings(block) if item.extra_ffn != "none" else None
    if isinstance(around, str):
        return Problem(
            f"no extra sublayer can be added to the block: {around}", block.loc,
            hint="extra-ffn=none",
        )  # fmt: skip
    return None


def misrouted(
    item: UpcycleOptions, graph: Graph, block: FFNBlock, causal: set[Value]
) -> Problem | None:
    """Return why the kind of routing is not possible at the location of `block`, or None.

    Args:
      item: the options.
      graph: the graph.
      block: a block.
      causal: the values after a causal mask.
    """
    if item.routing in LOOKS_AHEAD and block.x in causal:
        other = ", or decoder-layers=nowhere" if is_decoder(block.loc) else ""
        return Problem(
            f"{NAMES[item.routing]} in a decoder decides about a token by later ones", block.loc,
            hint=f"routing=token-choice{other}; ST-MoE (Appendix D) has what looks ahead in "
            "encoders only",
        )  # fmt: skip
    tokens = [n for n in block.x.type.names if n != block.outer]
    if item.routing == "hash" and token_ids(graph, block.x.type, tokens, block.loc) is None:
        return Problem(
            "a hash needs the ids of the tokens, and the graph has no such input", block.loc,
            f"an input of whole numbers, [{', '.join(tokens)}]",
            ", ".join(f"%{n}" for n in graph.inputs) or "no input", "routing=token-choice",
        )  # fmt: skip
    return None


def _groups_fit(item: UpcycleOptions, slices: int, neurons: int) -> bool:
    return not (neurons % slices or item.top_k % slices or item.experts % slices)


def factors_of(item: UpcycleOptions, block: FFNBlock) -> Factors:
    """Return the factor of each parameter of a valid block."""
    chosen = scale_factors(block, item.scale_placement, item.law.weight_scale)
    assert not isinstance(chosen, str), "checked before anything was changed"
    return chosen


def recipe(item: UpcycleOptions, block: FFNBlock, seed: int, texts: tuple[str, ...] = ()) -> Recipe:
    """Return the recipe for the rewrite of a valid block.

    Args:
      item: the options.
      block: the block.
      seed: of the conversion.
      texts: the texts of the statistics, if there are any.
    """
    division = _division(item, block, seed)
    factors = dict(factors_of(item, block))
    if block.output_bias is not None:
        factors[block.output_bias] = item.law.bias_scale
    return Recipe(
        division=division,
        router=_router(item, block, division, seed, texts),
        factors=factors,
        perturb=_perturb(item, block, division, seed),
        expert_bias=item.expert_bias,
        extra_ffn=item.extra_ffn,
        shared_gate=item.shared_gate,
        models=item.models,
    )


def _division(item: UpcycleOptions, block: FFNBlock, seed: int) -> Division:
    shared = round(item.shared * block.width)
    padding = item.padding(block.width, shared)
    return Division(
        inner=block.inner,
        shared=shared,
        slices=item.slices,
        copies=item.experts // item.slices,
        width=(block.width + padding - shared) // item.slices,
        order=neuron_order(item, block, shared, seed, _slots(block)),
        padding=padding,
    )


def _router(
    item: UpcycleOptions, block: FFNBlock, division: Division, seed: int, texts: tuple[str, ...]
) -> Router:
    assignment: SlotOptions = {"slots": item.slots}
    if item.is_bounded:
        assignment["capacity_factor"], assignment["groups"] = item.capacity_factor, item.groups
    return Router(
        kind=item.routing,
        weight=_weight(item, block, division, seed, texts),
        experts=item.experts,
        top_k=item.top_k,
        gates=item.law.convention,
        gate_scale=item.gate_scale,
        has_bias=item.balance_bias,
        seed=seed,
        assignment=assignment,
    )


def _weight(
    item: UpcycleOptions, block: FFNBlock, division: Division, seed: int, texts: tuple[str, ...]
) -> Expr | None:
    if item.routing == "hash":
        return None
    if item.is_fitted:
        return fitted_weight(item, block, division, texts)
    kind = DRAWN.get(item.router_init, item.router_init)
    std, outer = router_std(item, block), block.x.type[block.outer]
    key = derive_key(seed, f"{_slots(block)}/router")
    if item.routing == "soft":
        return slot_weight(kind, std, outer, item.experts, item.soft_slots, key=key)
    # The parts of a split block are chosen each for itself.
    rows = replace(division, copies=item.experts, slices=1) if item.is_split else division
    return router_weight(kind, std, outer, rows, key=key)


def router_std(item: UpcycleOptions, block: FFNBlock) -> float:
    """Return the standard deviation of the router's entries.

    Where ``router-std`` is that of the logits, the input is taken to have unit mean square.
    """
    is_of_logits = item.router_init in DRAWN or item.is_fitted
    return item.router_std / sqrt(block.embed) if is_of_logits else item.router_std


def _perturb(item: UpcycleOptions, block: FFNBlock, division: Division, seed: int) -> Perturb:
    if item.init == "noise":
        return Noise(item.noise_std, item.noise == "relative", seed, _slots(block)).apply
    if item.init == "drop":
        return Drop(item.drop_ratio, seed, _slots(block), division).apply
    return _unperturbed


def _slots(block: FFNBlock) -> str:
    """Return the key of a block's draws; the location alone may not be unique."""
    return f"{block.loc}/{block.down.operands[1].name}"


def _unperturbed(name: str, dense: Expr, experts: Expr) -> Expr:
    return experts
