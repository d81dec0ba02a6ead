"""The graph rewrite: one dense block becomes routing, lifted experts, and a shared expert.

With N experts in E = N/G virtual groups of G slices, a chosen group whose members have gate w adds
w times the dense block, so the sparse block gives (Σ w / G) · s times it, where s scales the last
matrix.  It equals the dense block where s = G / Σ w (``docs/exactness.md``):
for any router where Σ w is constant, and only for a zero router where it is not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import sqrt

from moecc.analysis import FFNBlock
from moecc.errors import InputError
from moecc.ir.builder import Builder
from moecc.ir.conventions import convention
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.moe import emit_shared_gate
from moecc.ir.structure import weight_of
from moecc.rewrite import P, fits
from moecc.rewrite.passes import Preserves, weakest
from moecc.support.lazy import np
from moecc.types import Axis, tensor
from moecc.types import Doubles as Array
from moecc.weights.arithmetic import BASE, mean_over, scaled
from moecc.weights.expr import Expr, Full
from moecc_passes.upcycle.options import GateLaw as GateLaw
from moecc_passes.upcycle.options import UpcycleOptions
from moecc_passes.upcycle.routers import (
    UpcycleRecipe,
    branched,
    emit_router,
    lifted,
    shared_part,
)

# An extra dense feed-forward sublayer beside a sparse one (ST-MoE, section 5 and Table 16).
#
# It has the shape of the dense block, its own norm and residual, and its last matrix is zero: it
# adds exactly nothing until it is trained.


SCALED = P.scale(P.any())
SUM = P.add(P.any(), P.any())


@dataclass(frozen=True)
class ResidualStream:
    """The residual stream around a block.

    Attributes:
      before: the stream that the sublayer adds to.
      after: the stream after the sublayer.
      norm: the norm through which the block reads; None if norms follow the sum.
      sum: the node that adds the block to the stream.
    """

    before: Value
    after: Value
    norm: Node | None
    sum: Node


def surroundings(block: FFNBlock) -> ResidualStream | str:
    """Return the residual stream around `block`, or why no sublayer can be added to it."""
    total = block.output.only_user
    while match := fits(SCALED, total):
        total = match.root.result.only_user
    if total is None or not fits(SUM, total):
        return "nothing adds its output to a residual stream"
    norm = block.x.node
    if norm is not None and norm.op.is_norm and norm.operands[0] in total.operands:
        return ResidualStream(norm.operands[0], total.result, norm, total)
    if block.x not in total.operands:
        return "its output is added to another value than its input"
    behind = total.result.only_user
    is_normed = behind is not None and behind.op.is_norm
    after = behind.result if behind is not None and is_normed else total.result
    return ResidualStream(block.x, after, None, total)


def _add_sublayer(graph: Graph, block: FFNBlock, where: str) -> None:
    """Emit a copy of a dense block ``before`` or ``after`` it; call it before erasing the block."""
    around = surroundings(block)
    assert not isinstance(around, str), "checked before anything was changed"
    stream = around.before if where == "before" else around.after
    users = [(n, i) for n in stream.users for i, v in enumerate(n.operands) if v is stream]
    if where == "before":
        mine = {*block.nodes, around.sum, around.norm}
        users = [(n, i) for n, i in users if n in mine]
    # The first node that must read the new stream; None if only outputs do.
    readers = {n for n, _ in users}
    following = next((n for n in graph.walk(stream.node) if n in readers), None)
    head, _, last = block.loc.rpartition(".")
    loc = f"{head}.extra_{last}" if head else f"extra_{last or 'ffn'}"
    builder = Builder(graph, loc=loc, origin="upcycle/extra-ffn", before=following)

    def copy(param: Value, weight: Expr | None = None) -> Value:
        weight = weight or weight_of(param, param.name)
        return graph.param(graph.fresh(f"{param.name}.extra"), param.type, weight, loc=loc)

    x, norm = stream, around.norm
    if norm is not None:
        # A gain may be computed from a parameter, as Gemma's is, which is one more.
        nodes, image = [*_sources_of(norm.operands[1:]), norm], {norm.operands[0]: stream}
        for value in (v for node in nodes for v in node.operands):
            if value.is_param and value not in image:
                image[value] = copy(value)
        x = _emit(builder, nodes, image, at_loc=True)[norm.result]
    image = {block.x: x}
    for param in block.params:
        is_zero = param is block.down.operands[1] or param is block.output_bias
        zeros = Full(0.0, weight_of(param, param.name).type)
        image[param] = copy(param, zeros if is_zero else None)
    sublayer = _emit(builder, block.nodes, image, at_loc=True)[block.output]
    total = builder.add(stream, sublayer)
    for node, index in users:
        node.set_operand(index, total)


def _sources_of(values: Iterable[Value]) -> list[Node]:
    """Return the nodes that values are computed by, each after those that it reads."""
    nodes: list[Node] = []
    left = [value.node for value in values]
    while left:
        node = left.pop()
        if node is not None:
            nodes.append(node)
            left += [value.node for value in node.operands]
    # The last time that a node was met is behind all that read it.
    return list(dict.fromkeys(reversed(nodes)))


def rewrite_block(
    graph: Graph, block: FFNBlock, recipe: UpcycleRecipe, rewritten: dict[tuple[Value, str], Value]
) -> None:
    """Replace `block` by its sparse version, and erase parameters that become unused.

    Args:
      graph: the graph.
      block: the block.
      recipe: how it is rewritten.
      rewritten: what parameters of earlier blocks became, ``experts`` or ``shared``; layers that
        share parameters (ALBERT's) share these. It is added to.

    Raises:
      InputError: layers that share parameters would get experts of their own.
    """
    item, division = recipe.item, recipe.division
    if item.extra_ffn != "none":
        _add_sublayer(graph, block, item.extra_ffn)
    names = {p: p.name for p in block.params}
    leaving = [p for p in names if p.users.keys() <= set(block.nodes)]
    for param in leaving:
        graph.rename(param, graph.fresh(f"{param.name}.dense"))
    # All inputs of the block, constants included, are defined before its last node.
    builder = Builder(graph, loc=block.loc, origin="upcycle/lift", before=block.nodes[-1])
    prefix = re.sub(r"[^A-Za-z0-9_.\-]", "_", block.loc) or "ffn"
    rows, finish = emit_router(builder, block, recipe, prefix)
    image, expert = {block.x: rows}, Axis("expert", division.experts)
    for param, name in names.items():
        # The experts' parameter has the name of the dense one.
        dense, is_last = weight_of(param, name), param is block.down.operands[1]
        if item.models:
            weight = branched(dense, division, item.models, is_last=is_last)
        else:
            weight = lifted(dense, division, is_last=is_last)
        weight = scaled(recipe.perturb(name, dense, weight), recipe.factors.get(param, 1.0))
        type = param.type.with_axes([expert, *_resized(param, block.inner, division.width)])
        earlier = rewritten.get((param, "experts"))
        if earlier is not None and (earlier.weight, earlier.type) != (weight, type):
            raise InputError(
                "layers share this parameter, and each would get experts of its own",
                where=f"{block.loc}: %{name}",
                hint="split=index, or no split, keeps the layers alike",
            )
        image[param] = earlier or graph.param(graph.fresh(name), type, weight, loc=param.loc)
        rewritten[param, "experts"] = image[param]
    at, hidden = block.nodes.index(block.down), block.down.operands[0]
    _emit(builder, block.nodes[:at], image)
    if item.expert_bias != "none":
        # A vector for each expert on the hidden value, ones or zeros (ST-MoE, Appendix C).
        is_product = item.expert_bias == "multiplicative"
        type = hidden.type.with_axes((expert, Axis(block.inner, division.width)))
        fresh, ones = graph.fresh(f"{prefix}.expert_bias"), Full(1.0 if is_product else 0.0, type)
        bias = graph.param(fresh, type, ones, loc=block.loc)
        image[hidden] = (builder.mul if is_product else builder.add)(image[hidden], bias)
    output = finish(_emit(builder, block.nodes[at:], image)[block.output])
    if division.shared:
        output = builder.add(output, _shared(builder, block, names, recipe, prefix, rewritten))
    block.output.replace_by(output)
    for node in reversed(block.nodes):
        node.erase()
    for param in leaving:
        graph.erase_param(param.name)
        # The experts of a parameter that stays may have its name: %w1 gives %w2.
        if graph.fresh(names[param]) == names[param]:
            graph.rename(image[param], names[param])


def average_rest(graph: Graph, models: Sequence[str]) -> None:
    """Make every parameter but those of experts the mean over `models`, each as often as listed."""
    for param in graph.params.values():
        weight = weight_of(param, param.name)
        if "expert" not in param.type:
            param.weight = mean_over(weight, models)


def _resized(param: Value, inner: str, width: int) -> list[Axis]:
    return [Axis(a.name, width) if a.name == inner else a for a in param.type.axes]


def _emit(
    builder: Builder, nodes: Sequence[Node], image: dict[Value, Value], *, at_loc: bool = False
) -> dict[Value, Value]:
    """Emit `nodes` again, the same operations on the images of their operands.

    With `at_loc`, they have the builder's location and fresh names.
    """
    loc = builder.loc
    for node in nodes:
        builder.loc = loc if at_loc else node.loc
        names = () if at_loc else tuple(v.name for v in node.results)
        operands = [image.get(v) or (_constant(builder, v) if at_loc else v) for v in node.operands]
        copy = builder.node(node.op.name, *operands, names=names, **node.attrs)
        image.update(zip(node.results, copy.results, strict=True))
    builder.loc = loc
    return image


def _constant(builder: Builder, value: Value) -> Value:
    """Emit again a constant that a block reads: it may be defined later."""
    assert value.node is not None, "a block reads only constants from outside"
    return builder.node(value.node.op.name, names=(), **value.node.attrs).result


def _shared(
    builder: Builder,
    block: FFNBlock,
    names: Mapping[Value, str],
    recipe: UpcycleRecipe,
    prefix: str,
    rewritten: dict[tuple[Value, str], Value],
) -> Value:
    """Emit the shared expert on the first neurons, gated by sigmoid(0) = ½ and doubled for it.

    Without a gate it is added as it is.
    """
    graph, division = builder.graph, recipe.division
    is_gated = recipe.item.shared_gate == "sigmoid"
    image = {block.x: block.x}
    for param in block.params:
        if param is block.output_bias:
            continue
        is_last = param is block.down.operands[1]
        part = shared_part(weight_of(param, names[param]), division, is_last=is_last)
        if is_last and is_gated:
            part = scaled(part, 2.0)
        type = param.type.with_axes(_resized(param, block.inner, division.shared))
        if (param, "shared") not in rewritten:
            fresh = graph.fresh(f"{names[param]}.shared")
            rewritten[param, "shared"] = graph.param(fresh, type, part, loc=block.loc)
        image[param] = rewritten[param, "shared"]
    # The experts' gates already add up the output bias, so it is not added here.
    nodes = block.nodes if block.output_bias is None else block.nodes[:-1]
    shared = _emit(builder, nodes, image)[block.down.result]
    if not is_gated:
        return shared
    type = tensor(block.x.type.dtype, **{block.outer: block.embed})
    fresh = graph.fresh(f"{prefix}.shared_gate.weight")
    gate = graph.param(fresh, type, Full(0.0, type), loc=block.loc)
    return emit_shared_gate(builder, block.x, gate, shared)


# Gates of random tokens under one law, and the moments of their sum: what upcycling is off by.

SAMPLES = 4096
"""Random tokens from which the moments of the gates are estimated."""


@dataclass(frozen=True)
class GateMoments:
    """Moments of the gates over tokens, where 1 is the dense block.

    Attributes:
      ratio: the mean of ρ = s · Σ w / G.
      squared: the mean of ρ².
      concentration: the mean of ρ² · Σ a², with a the share of Σ w of each chosen group: 1 / k for
        k equal gates.  Errors that the copies make independently are averaged by it.
    """

    ratio: float
    squared: float
    concentration: float


@lru_cache(maxsize=256)
def gate_moments(law: GateLaw, logit_std: float) -> GateMoments:
    """Return the moments of ρ = s · Σ w / G over tokens whose logits are normal.

    Args:
      law: the sum of the gates.
      logit_std: the standard deviation of the router's logits.
    """
    if logit_std == 0:
        return GateMoments(1.0, 1.0, law.granularity / law.top_k)
    rng = np.random.default_rng(0)
    groups = rng.normal(0, logit_std, (SAMPLES, law.experts // law.granularity))
    gates = gates_of(law, np.repeat(groups, law.granularity, axis=1))
    of_groups = gates.reshape(SAMPLES, -1, law.granularity).sum(2) / law.total
    ratio = of_groups.sum(1)
    return GateMoments(
        float(ratio.mean()), float(np.mean(ratio**2)), float((of_groups**2).sum(1).mean())
    )


def gates_of(law: GateLaw, logits: Array) -> Array:
    """Return the gates ``[tokens, choice]``, largest logit first, of ``[tokens, expert]``."""
    k = law.top_k
    if law.has_prototypes:
        parts = logits.reshape(len(logits), k, -1)
        gates: Array = 1 / np.exp(parts - parts.max(2, keepdims=True)).sum(2)
    else:
        best = -np.sort(-logits, axis=1, kind="stable")
        gates = MEANINGS[law.convention](best, k)
    if convention(law.convention).renormalised:
        gates = gates / gates.sum(1, keepdims=True)
    return gates * law.gate_scale


def _softmax(best: Array, top_k: int) -> Array:
    share = np.exp(best - best[:, :1])
    gates: Array = share[:, :top_k] / share.sum(1, keepdims=True)
    return gates


def _sigmoid(best: Array, top_k: int) -> Array:
    gates: Array = 1 / (1 + np.exp(-best[:, :top_k]))
    return gates


def _sparsemixer(best: Array, top_k: int) -> Array:
    return np.stack([_nearest(best, chosen) for chosen in range(top_k)], axis=1)


def _nearest(best: Array, chosen: int, jitter: float = 0.01) -> Array:
    """Return the gate of the choice number `chosen` among the sorted logits `best` (PhiMoE)."""
    left = best[:, chosen:]
    top = left[:, :1]
    near = (top - left) / np.maximum(np.abs(left), np.abs(top)).clip(1e-30) <= 2 * jitter
    gate: Array = 1 / np.where(near, np.exp(left - top), 0).sum(1)
    return gate


def _ones(best: Array, top_k: int) -> Array:
    return np.ones((len(best), top_k))


MEANINGS: dict[str, Callable[[Array, int], Array]] = {
    "renormalised": _softmax,
    "softmax": _softmax,
    "sigmoid-renormalised": _sigmoid,
    "sigmoid": _sigmoid,
    "sparsemixer": _sparsemixer,
    "ones": _ones,
}
"""Gates ``[tokens, choice]`` of logits ``[tokens, expert]``, largest first, by convention, before
any division by their sum: as the reference has them, for thousands of tokens at once."""


# Placement of the factor that the gates require, and whether it scales the block.

Factors = Mapping[Value, float]
"""The factor of each parameter; missing ones are not scaled."""


def scale_factors(block: FFNBlock, placement: str, scale: float) -> Factors | str:
    """Return the factor of each parameter of `block`, or why `placement` is not possible.

    ``down`` puts the whole scale on the last matrix.  ``up-down`` puts √scale there and √scale on
    a matrix in which the hidden value is linear, which for SwiGLU is ``up`` and never ``gate``.
    ``cube-root`` puts equal shares on all matrices, as published (He et al. 2024): the cube root
    for a gated block and for squared ReLU, the square root for others with two matrices.  A bias
    before the activation is scaled like the matrix before it.  Not included is a bias after the
    last matrix, which the scale does not touch.
    """
    if scale == 1:
        return {}
    down = block.down.operands[1]
    factors = {down: scale}
    if placement == "cube-root":
        factors = dict.fromkeys((*block.degrees(), down), scale ** (1 / shares(block)))
    elif placement == "up-down":
        linear = [w for w, degree in block.degrees().items() if degree == 1]
        if not linear:
            return (
                "no matrix before the activation can be scaled, because the block is linear in none"
            )
        factors = {linear[-1]: scale**0.5, down: scale**0.5}
    for up in block.ups:
        if up.operands[1] in factors:
            factors |= dict.fromkeys(block.biases_of(up), factors[up.operands[1]])
    if placement == "cube-root" or is_scaled(block, factors, scale):
        return factors
    return "a parameter is used in two positions that would need different factors"


def shares(block: FFNBlock) -> int:
    """Return n where ``cube-root`` scales each matrix by the n-th root of the scale."""
    return 1 + sum(degree or 1 for degree in block.degrees().values())


def is_scaled(block: FFNBlock, factors: Factors, scale: float) -> bool:
    """Whether multiplying parameters by `factors` multiplies the block by `scale`.

    The output bias is excluded.  The result is false if the dataflow does not show it.
    """
    scales: dict[Value, float | None] = {block.x: 1.0}
    for node in block.nodes:
        operands = [scales.get(v, factors.get(v, 1.0)) for v in node.operands]
        positive = [f for f in operands if f is not None]
        is_known = len(positive) == len(operands)
        scales[node.result] = node.op.homogeneity.factor(positive) if is_known else None
        if node is block.down:
            break
    total = scales[block.down.result]
    return total is not None and abs(total / scale - 1) < 1e-9


# The promise of an upcycling, by the lemmas of ``docs/exactness.md``.


def promise(item: UpcycleOptions, block: FFNBlock | None, logit_std: float | None) -> Preserves:
    """Return the promise for a block, or of the options alone, with the error of its output.

    The error is the root mean square for a block of many independent neurons.  The chosen groups
    give ρ times the block, plus errors.  Of a share r of neurons that are drawn anew ρ·r is missing
    whatever the number of groups, and what varies from expert to expert, r (1 − r) for the choice
    of neurons, r for the new ones, or (1 + λ²)ᵐ − 1 for noise λ on m matrices, is averaged over the
    groups.  A shared expert takes no part in any of it.

    Args:
      item: the options.
      block: the block.
      logit_std: the standard deviation of the router's logits; None if unknown yet.
    """
    law, matrices = item.law, 3 if block is None else len(block.ups) + 1
    logit_std = 0.0 if item.router_is_zero else logit_std
    drop = item.drop_ratio if item.init == "drop" else 0.0
    noise = item.noise_std if item.init == "noise" else 0.0
    is_complete = item.top_k == item.experts and (item.router_is_zero or item.gates == "ones")
    is_partial = item.is_split and not is_complete
    models = dict.fromkeys(item.models) if set(item.models) != {BASE} else {}
    is_soft, placement = item.routing == "soft", _inexact_placement(item, block)
    parts = (
        f"a token gets {item.top_k} of the {item.experts} parts of a block"
        if item.top_k < item.experts
        else "gates weigh the parts of a block unequally unless the router is zero"
    )
    reasons = (
        (is_soft, "a soft mixture gives experts averages of tokens, and the block is not linear"),
        (
            not (law.is_constant or logit_std == 0 or is_partial),
            f"{law.convention} gates do not add up to a constant unless the router is zero",
        ),
        (noise, f"{item.noise} noise of std {noise:g} on every expert"),
        (drop, f"a share of {drop:g} of the neurons of every expert is drawn anew"),
        (is_partial, parts),
        (models, f"experts come from several models: {', '.join(models)}"),
        (placement, placement),
        (
            item.is_bounded,
            f"a capacity factor of {item.capacity_factor:g} may drop choices",
        ),
    )
    reason = "; ".join(text for holds, text in reasons if holds)
    if not reason:
        return Preserves("reassociation")
    is_unknown = logit_std is None and not law.is_constant
    is_bounded = item.is_bounded or is_soft or is_partial
    if is_unknown or is_bounded or models or placement or (noise and item.noise == "absolute"):
        return Preserves("approximate", reason)
    moments = gate_moments(law, logit_std or 0.0)
    varies = drop * (2 - drop) + (1 + noise**2) ** matrices - 1
    common = 1 - 2 * (1 - drop) * moments.ratio + (1 - drop) ** 2 * moments.squared
    square = max(common + varies * moments.concentration, 0.0)
    return Preserves("approximate", reason, sqrt(square * (1 - item.shared)))


def factors_of(item: UpcycleOptions, block: FFNBlock) -> Factors:
    """Return the factor of each parameter of a valid block."""
    factors = scale_factors(block, item.scale_placement, item.law.weight_scale)
    assert not isinstance(factors, str), "checked before anything was changed"
    return factors


def _inexact_placement(item: UpcycleOptions, block: FFNBlock | None) -> str:
    """Return why the placement of the scale is not exact; empty if it is."""
    scale = item.law.weight_scale
    if item.scale_placement != "cube-root" or scale == 1:
        return ""
    if block is not None and is_scaled(block, factors_of(item, block), scale):
        return ""
    return (
        f"scale-placement=cube-root puts {scale:g}^(1/{3 if block is None else shares(block)}) "
        "before the activation too, which is exact only for activations that are homogeneous"
    )


def of_blocks(promises: Sequence[Preserves]) -> Preserves:
    """Return the promise for a model whose blocks were changed so: the error is the worst block's.

    Args:
      promises: those of the blocks, at least one.
    """
    joined = weakest(dict.fromkeys(promises))
    if joined.predicted_error is None:
        return joined
    return replace(joined, predicted_error=max(p.predicted_error or 0.0 for p in promises))
