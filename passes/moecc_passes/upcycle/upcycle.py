"""The pass ``upcycle``: convert dense feed-forward blocks to mixtures of experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from math import sqrt

from moecc.analysis import FFNBlock, find_ffn_blocks
from moecc.errors import InputError, Problem
from moecc.ir.conventions import convention
from moecc.ir.graph import Graph, Value
from moecc.rewrite.driver import may_rewrite
from moecc.rewrite.passes import Context, Pass, PassResult, Preserves, ReadWeight, Remark
from moecc.rewrite.pattern import NearMiss
from moecc.support.text import amount
from moecc.types import F32, Axis, TensorType
from moecc.weights.arithmetic import BASE
from moecc.weights.draws import derive_key
from moecc.weights.expr import Expr
from moecc_passes.routed import CAUSAL_INPUTS, causal_values, is_decoder, token_ids
from moecc_passes.upcycle.options import (
    UpcycleOptions,
    check_layers,
    choose,
    lints,
    unknown_models,
)
from moecc_passes.upcycle.rewrite import (
    average_rest,
    factors_of,
    of_blocks,
    promise,
    rewrite_block,
    scale_factors,
    surroundings,
)
from moecc_passes.upcycle.routers import (
    LOOKS_AHEAD,
    NAMES,
    Division,
    Drop,
    Noise,
    Perturb,
    UpcycleRecipe,
    drawn,
    fitted_weight,
    input_rms,
    left_of_std,
    missing,
    neuron_order,
    repeated,
    unread,
)

# Checks of the options of ``upcycle`` alone: errors and warnings.

RENORMALISED = ("renormalised", "top-k-softmax")
"""Spellings of one convention, see `moecc.ir.conventions.SPELLINGS`."""

GATES_OF = {
    "prototypes": (*RENORMALISED, "softmax"),
    "hash": RENORMALISED,
    "expert-choice": RENORMALISED,
    "soft": RENORMALISED,
}
"""The gate conventions of each kind of routing; token choice supports all."""

MOST_EXPERTS = 1 << 14
"""Each expert is a weight of its own on disk: a limit keeps a typo from taking hours."""

_WHY = {
    "prototypes": "each prototype chooses by a softmax of its own",
    "hash": "a hash has no scores that gates could be made of",
    "expert-choice": "where experts choose tokens, a token has no best experts",
    "soft": "in a soft mixture no token chooses anything",
}


def _counts(item: UpcycleOptions) -> Iterator[Problem]:
    n, k, g = item.experts, item.top_k, item.granularity
    if n < 2:
        yield Problem("a mixture needs at least two experts", "experts", found=str(n))
    if n > MOST_EXPERTS:
        yield Problem(
            "too many experts",
            "experts",
            f"at most {MOST_EXPERTS:,}",
            f"{n:,}",
            "Switch-C, the largest that was published, has 2,048",
        )
    if k > n or k < 1:
        yield Problem(
            "top-k does not suit the experts",
            "top-k",
            f"1 <= top-k <= experts={n}",
            str(k),
            f"store more experts: experts={max(k, 2)}; ST-MoE has top-k=2" if k > n else "top-k=1",
        )
    if g < 1:
        yield Problem("granularity must be at least 1", "granularity", found=str(g))
    elif k % g or n % g:
        yield Problem(
            "a token must go to whole virtual groups",
            "granularity",
            f"G that divides top-k={k} and experts={n}",
            str(g),
            f"top-k={-(-k // g) * g} experts={max(-(-n // g), -(-k // g)) * g} would do",
        )


def _gates(item: UpcycleOptions) -> Iterator[Problem]:
    k, g = item.top_k, item.granularity
    if item.gates == "switch" and k != 1:
        yield Problem(
            "switch routing has one expert a token",
            "gates",
            "top-k=1",
            f"top-k={k}",
            "gates=softmax weighs several by their probabilities",
        )
    row = convention(item.gates)
    if row.max_top_k is not None and k > row.max_top_k:
        yield Problem(
            f"{row.name} gates exist for one or two experts a token",
            "gates",
            f"top-k<={row.max_top_k}",
            f"top-k={k}",
            "gates=renormalised takes any top-k",
        )
    if not row.equal_for_equal_logits and g > 1:
        yield Problem(
            f"{row.name} gates differ among the members of a virtual group",
            "gates",
            "granularity=1",
            f"granularity={g}",
            "gates=renormalised suits any granularity",
        )
    if item.balance_bias and row.score is None:
        yield Problem(
            f"{item.gates} gates have no score that a bias could be added to",
            "balance-bias",
            found=f"gates={item.gates}",
            hint="gates=sigmoid-renormalised is DeepSeek-V3's",
        )


def _routing(item: UpcycleOptions) -> Iterator[Problem]:
    """Yield the options that the kind of routing does not support."""
    kind = item.routing
    if kind == "token-choice":
        return
    allowed = GATES_OF[kind]
    scales = kind == "prototypes" or item.gate_scale == 1
    checks = (
        ("gates", item.gates in allowed, f"gates={allowed[0]}", item.gates),
        ("granularity", item.granularity == 1, "granularity=1", item.granularity),
        ("gate-scale", scales, "gate-scale=1.0", item.gate_scale),
        ("balance-bias", not item.balance_bias, "balance-bias=false", "true"),
    )
    for name, fits, expected, value in checks:
        if not fits:
            yield Problem(
                _WHY[kind], name, expected, str(value), "routing=token-choice has this option"
            )
    if kind == "prototypes" and item.top_k >= 1 and item.experts % item.top_k:
        yield Problem(
            "the prototypes do not divide the experts",
            "top-k",
            f"a divisor of experts={item.experts}",
            str(item.top_k),
        )
    if kind == "soft" and item.slots == "capacity":
        yield Problem(
            "a soft mixture drops nothing, so it has no capacity",
            "slots",
            found="capacity",
            hint="soft-slots says how many slots an expert has",
        )
    if kind in LOOKS_AHEAD:
        yield from _decoders(item)


_SHOWN_COPIES = 16


def _sources(item: UpcycleOptions) -> Iterator[Problem]:
    models, copies = item.models, max(item.experts, 0) // max(item.granularity, 1)
    names = islice(cycle(models or (BASE, "a")), min(copies, _SHOWN_COPIES))
    every_copy = ",".join([*names, *["…"] * (copies > _SHOWN_COPIES)])
    if not models and item.rest != "base":
        yield Problem(
            "without sources there is nothing to take a mean of",
            "rest",
            "base",
            item.rest,
            f"sources={every_copy} names the model of each copy",
        )
    if models and len(models) * item.granularity != item.experts:
        yield Problem(
            "every copy comes from one model",
            "sources",
            f"experts / granularity = {item.experts}/{item.granularity} names",
            f"{len(models)} names",
            f"experts={len(models) * item.granularity}"
            + (f", or sources={every_copy}" if len(models) < copies else ""),
        )
    if models and item.init != "copy":
        yield Problem("experts of several models are not made to differ", "init", "copy", item.init)


def _split(item: UpcycleOptions) -> Iterator[Problem]:
    if item.is_split:
        for name, fits, value, expected in (
            ("granularity", item.granularity == 1, item.granularity, "1, or split=none"),
            ("sources", not item.models, item.sources, "none, or split=none"),
            ("routing", item.routing == "token-choice", item.routing, "token-choice"),
        ):
            if not fits:
                message = "a split block has each neuron once, in an expert that a token chooses"
                yield Problem(message, name, expected, str(value))
    if item.is_fitted and item.routing in ("hash", "soft"):
        yield Problem(
            "there is no router to fit", "router-init", "token-choice", f"routing={item.routing}"
        )


def _decoders(item: UpcycleOptions) -> Iterator[Problem]:
    routing = NAMES[item.routing]
    hint = "ST-MoE (Appendix D) has what looks ahead in encoders only: decoder-layers=nowhere"
    if item.decoder_layers not in (None, "nowhere"):
        yield Problem(
            f"{routing} in a decoder decides about a token by later ones",
            "decoder-layers",
            "nowhere",
            item.decoder_layers,
            hint,
        )
    if is_decoder(item.layers):
        yield Problem(
            f"{routing} in a decoder decides about a token by later ones",
            "layers",
            "layers of an encoder",
            item.layers,
            hint,
        )


def _warnings(item: UpcycleOptions) -> Iterator[Problem]:
    """Yield warnings of options that are allowed but rarely intended."""
    if has_constant_gate(item):
        yield Problem(
            "the gate of one expert, renormalised, is always 1, so the router gets no "
            "gradient from the model's loss",
            "top-k",
            "top-k=2, as ST-MoE has it",
            "top-k=1",
            "gates=switch is the paper's top-1",
        )
    if item.experts & (item.experts - 1):
        yield Problem(
            "the experts are not a power of two, which meshes and some kernels ask for",
            "experts",
            found=str(item.experts),
        )
    if item.router_init == "zero" and item.routing == "token-choice":
        yield Problem(
            "every token has equal logits, so the first experts are always chosen",
            "router-init",
            "another, unless the router is trained or noisy first",
            "zero",
        )
    if item.slots == "ragged" and item.routing not in LOOKS_AHEAD:
        for name, value, default in (
            ("capacity-factor", item.capacity_factor, 1.25),
            ("groups", item.groups, 1),
        ):
            if value != default:
                yield Problem(
                    f"{name} bounds nothing where slots are ragged",
                    name,
                    found=f"{name}={value}",
                    hint="slots=capacity",
                )


def has_constant_gate(item: UpcycleOptions) -> bool:
    """Return whether a router is to be trained whose one gate is always 1."""
    is_one = item.top_k == 1 and convention(item.gates).renormalised
    return is_one and item.routing in ("token-choice", "prototypes")


# The recipe of a block from the options of ``upcycle``, and why a block is rejected.

DRAWN = {"logit-std": "normal", "switch": "switch"}
"""The initialisations whose ``router-std`` is that of the logits."""


def misfit(item: UpcycleOptions, block: FFNBlock) -> Problem | None:
    """Return why `block` cannot be divided or scaled as the options require, or None."""
    shared = item.shared * block.width
    neurons = round(shared)
    if item.shared and (abs(shared - neurons) > 1e-6 or not 0 < neurons < block.width):
        nearest = min(max(neurons, 1), block.width - 1)
        return Problem(
            "the shared expert does not get a whole number of neurons, or leaves none",
            block.loc,
            f"shared={nearest / block.width:.10g}, say",
            f"{item.shared:g} of {block.width}",
        )
    padding = item.padding(block.width, neurons)
    if padding > block.width:
        return Problem(
            "more neurons would be added than there are",
            block.loc,
            f"at most {block.width}",
            str(padding),
            "a smaller pad, or fewer slices",
        )
    routed = block.width + padding - neurons
    if item.is_split and routed % item.experts:
        return Problem(
            f"the {routed} neurons do not divide into parts",
            block.loc,
            f"a divisor of {routed}",
            f"experts={item.experts}",
            "pad=1 adds some that add nothing",
        )
    if routed % item.granularity:
        fits = [g for g in range(1, item.top_k + 1) if _groups_fit(item, g, routed)]
        return Problem(
            f"the {routed} neurons do not divide into granularity={item.granularity} slices",
            block.loc,
            f"G among {', '.join(map(str, fits))}",
            str(item.granularity),
            "pad=1 adds neurons that add nothing",
        )
    chosen = scale_factors(block, item.scale_placement, item.law.weight_scale)
    if isinstance(chosen, str):
        hint = None if item.scale_placement == "down" else "scale-placement=down"
        return Problem(f"{chosen} (by {item.law.weight_scale:g})", block.loc, hint=hint)
    around = surroundings(block) if item.extra_ffn != "none" else None
    if isinstance(around, str):
        return Problem(
            f"no extra sublayer can be added to the block: {around}",
            block.loc,
            hint="extra-ffn=none",
        )
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
        option = ", or decoder-layers=nowhere" if is_decoder(block.loc) else ""
        if CAUSAL_INPUTS in graph.attrs:
            option = ", or convert(…, causal=False) for an encoder"
        return Problem(
            f"{NAMES[item.routing]} in a decoder decides about a token by later ones",
            block.loc,
            hint=f"routing=token-choice{option}; ST-MoE (Appendix D) has what looks ahead in "
            "encoders only",
        )
    tokens = [n for n in block.x.type.names if n != block.outer]
    if item.routing == "hash" and token_ids(graph, block.x.type, tokens, block.loc) is None:
        return Problem(
            "a hash needs the ids of the tokens, and the graph has no such input",
            block.loc,
            f"an input of whole numbers, [{', '.join(tokens)}]",
            ", ".join(f"%{n}" for n in graph.inputs) or "no input",
            "routing=token-choice",
        )
    return None


def _groups_fit(item: UpcycleOptions, slices: int, neurons: int) -> bool:
    return not (neurons % slices or item.top_k % slices or item.experts % slices)


def recipe(
    item: UpcycleOptions,
    block: FFNBlock,
    seed: int,
    texts: tuple[str, ...] = (),
    drawn_at: str | None = None,
) -> UpcycleRecipe:
    """Return the recipe for the rewrite of a valid block.

    Args:
      item: the options.
      block: the block.
      seed: of the conversion.
      texts: the texts of the statistics, if there are any.
      drawn_at: the location whose random numbers the experts have, by default that of the block.
    """
    # The location alone may not be unique.
    down = block.down.operands[1].name
    draws = f"{drawn_at or block.loc}/{down}"
    shared = round(item.shared * block.width)
    padding = item.padding(block.width, shared)
    division = Division(
        inner=block.inner,
        shared=shared,
        slices=item.slices,
        copies=item.experts // item.slices,
        width=(block.width + padding - shared) // item.slices,
        order=neuron_order(item, block, shared, seed, draws),
        padding=padding,
    )
    factors = dict(factors_of(item, block))
    if block.output_bias is not None:
        factors[block.output_bias] = item.law.bias_scale
    perturb: Perturb = lambda name, dense, experts: experts  # noqa: E731
    if item.init == "noise":
        perturb = Noise(item.noise_std, item.noise == "relative", seed, draws).apply
    elif item.init == "drop":
        perturb = Drop(item.drop_ratio, seed, draws, division).apply
    router: Expr | None = None
    if item.is_fitted:
        router = fitted_weight(item, block, division, texts)
    elif item.routing != "hash":
        kind = DRAWN.get(item.router_init, item.router_init)
        # The parts of a split block are chosen each for itself.
        slices = 1 if item.is_split else division.slices
        axes = [Axis("expert" if slices == 1 else "copy", item.experts // slices)]
        if item.routing == "soft":
            axes.append(Axis("slot", item.soft_slots))
        type = TensorType(F32, (*axes, block.x.type[block.outer]))
        router = drawn(
            kind, router_std(item, block), type, derive_key(seed, f"{block.loc}/{down}/router")
        )
        if slices > 1:
            router = repeated(router, slices)
    return UpcycleRecipe(item, division, router, factors, perturb, seed)


def router_std(item: UpcycleOptions, block: FFNBlock) -> float:
    """Return the standard deviation of the router's entries.

    Where ``router-std`` is that of the logits, the input is taken to have unit mean square.
    """
    is_of_logits = item.router_init in DRAWN or item.is_fitted
    return item.router_std / sqrt(block.embed) if is_of_logits else item.router_std


# The remarks of ``upcycle`` on converted blocks.


def remarks(item: UpcycleOptions, blocks: list[FFNBlock]) -> list[Remark]:
    """Return remarks on the converted blocks."""
    how = {
        "token-choice": f"top-{item.top_k}",
        "prototypes": f"one of each of {item.top_k} groups",
        "hash": f"{item.top_k} by a hash of the token",
        "expert-choice": "which choose tokens",
        "soft": f"of {amount(item.soft_slots, 'soft slot')}",
    }[item.routing]
    lines = [Remark(b.loc, f"became {item.experts} experts, {how}") for b in blocks]
    if has_constant_gate(item):
        lines.append(
            Remark(
                "",
                "top-1 with renormalised gates: the gate is always 1, so the router "
                "gets no gradient from the loss; gates=switch or top-k=2 trains it",
            )
        )
    if item.router_init == "zero":
        lines.append(
            Remark(
                "",
                "a zero router sends every token to the first experts, and ties last "
                "until something breaks them; use it to check, not to train",
            )
        )
    if item.experts & (item.experts - 1):
        lines.append(Remark("", "some runtimes want a power of two of experts"))
    return lines


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

    name = "upcycle"
    summary = "turn dense feed-forward blocks into mixtures of experts"
    must_match = True

    @property
    def preserves(self) -> Preserves:
        """The promise of the options; `apply` refines it by the model's width."""
        return promise(self, None, None)

    def _logit_std(self, block: FFNBlock, read: ReadWeight) -> float:
        std = router_std(self, block) * left_of_std(self.router_init) * sqrt(block.embed)
        # Equal copies under gates with a constant sum are exact for any logits.
        is_exact = self.router_is_zero or (self.law.is_constant and self.init == "copy")
        return std if is_exact else std * input_rms(block, read)

    def validate(self) -> list[Problem]:
        """Return the problems of the options, independent of the model."""
        checks = (_counts, _gates, _routing, _sources, _split)
        layers = check_layers(self.layers)
        decoder = check_layers(self.decoder_layers or "all", "decoder-layers")
        spelled = [problem for problem in (layers, decoder) if problem is not None]
        return [*super().validate(), *(p for check in checks for p in check(self)), *spelled]

    def warnings(self) -> list[Problem]:
        """Return warnings of unwise combinations of options."""
        return list(_warnings(self))

    def lints(self) -> list[Problem]:
        """Return what the paper advises against."""
        return list(lints(self))

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Convert the blocks that ``layers`` selects.

        Raises:
          InputError: a selected layer has no block to convert, or its width does not divide, or
            the routing is not possible there; all problems at once.
        """
        search = find_ffn_blocks(graph)
        chosen = choose(search, self.layers, self.decoder_layers)
        causal = causal_values(graph)
        misfits = [
            misfit(self, b) or misrouted(self, graph, b, causal) or missing(self, b, ctx.statistics)
            for b in chosen
        ]
        unknown = [*unknown_models(self.models, ctx.models), *unread(self, ctx.statistics)]
        if any(misfits) or unknown:
            raise InputError([*unknown, *(p for p in misfits if p is not None)])
        result = PassResult(changed=bool(chosen), matched=len(chosen))
        result.near_misses = [NearMiss("upcycle", r.loc, r.reason) for r in search.refusals]
        if search.blocks and not chosen:
            count = len(search.blocks)
            every = f"layers=every:{count} or " if count > 1 else ""
            reason = f"layers={self.layers} selects none of its {amount(count, 'dense block')}"
            reason += f"; {every}layers=all"
            result.near_misses.append(NearMiss("upcycle", "the graph", reason))
        result.stats = {"blocks found": len(search.blocks), "blocks converted": len(chosen)}
        promises = []
        rewritten: dict[tuple[Value, str], Value] = {}
        first: dict[Value, str] = {}
        texts = () if ctx.statistics is None else tuple(ctx.statistics.texts)
        for block in chosen:
            if not may_rewrite(self.name, block.loc):
                break
            if ctx.promises:
                promises.append(promise(self, block, self._logit_std(block, ctx.read)))
            # Layers that share parameters share experts, and so their random numbers.
            at = first.setdefault(block.down.operands[1], block.loc)
            rewrite_block(graph, block, recipe(self, block, ctx.seed, texts, at), rewritten)
        if chosen and self.rest == "mean":
            average_rest(graph, self.models)
        result.preserves = of_blocks(promises) if promises else None
        result.remarks = remarks(self, chosen)
        for left in search.left_dense() if chosen else ():
            # Without the name of the value, which would make equal reasons of layers differ.
            reason = left.reason.partition(" = ")[2] or left.reason
            result.remarks.append(Remark(left.loc, f"cannot be converted: {reason}"))
        for remark in result.remarks:
            ctx.remark(remark)
        return result
