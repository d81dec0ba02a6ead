"""Lift the weights of a dense block to those of its experts.

A dense matrix is cut along the inner axis into the neurons of the shared expert and the rest, the
rest into G slices, and the slices are repeated E times, so that expert i holds slice i mod G.
The factor that the gates require is multiplied in, and copies are perturbed if the options say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import erf, exp, pi, sqrt
from typing import Literal

from moecc.analysis import FFNBlock
from moecc.errors import Problem
from moecc.ir.builder import Builder
from moecc.ir.graph import Value
from moecc.ir.moe import (
    Finish,
    emit_chosen,
    emit_expert_choice,
    emit_hash_routing,
    emit_prototypes,
    emit_rescaled,
    emit_routing,
    emit_soft_slots,
    emit_unit,
)
from moecc.ir.traits import Role
from moecc.rewrite.passes import NO_STATISTICS, ReadWeight, Statistics
from moecc.types import F32, PRED, Axis, TensorType, tensor
from moecc.weights.arithmetic import STATISTICS, Add, Moment, Mul, Select, name_in, read_from
from moecc.weights.draws import Normal, Subset, TruncatedNormal, Uniform, derive_key
from moecc.weights.expr import Expr, Full, Source
from moecc.weights.fits import Fitted
from moecc.weights.movement import (
    I32,
    Clusters,
    Concat,
    Index,
    Merge,
    Permutation,
    Permute,
    Rename,
    Slice,
    Split,
    Stack,
    Take,
    Tile,
)
from moecc_passes.routed import token_ids
from moecc_passes.upcycle.options import UpcycleOptions

_MOMENTS: tuple[Literal["mean", "std"], ...] = ("mean", "std")


@dataclass(frozen=True)
class Division:
    """How the neurons of one block are divided.

    Attributes:
      inner: the name of the axis of neurons.
      shared: the number of neurons of the shared expert, the first ones.
      slices: G, the slices that the other neurons are cut into.
      copies: E, how often each slice is stored.
      width: the neurons of one expert.
      order: the order that the neurons are put in before they are divided; None for their own.
      padding: the neurons that are added behind those of the dense block, before they are ordered;
        they add nothing.
    """

    inner: str
    shared: int
    slices: int
    copies: int
    width: int
    order: Expr | None
    padding: int

    @property
    def experts(self) -> int:
        """N = E · G, the stored experts."""
        return self.copies * self.slices

    @property
    def dense(self) -> int:
        """The neurons of the dense block, and those that are added."""
        return self.shared + self.slices * self.width

    def ordered(self, weight: Expr, *, is_last: bool = False) -> Expr:
        """Return a dense weight with its neurons in the order in which they are divided.

        Args:
          weight: the weight.
          is_last: whether it is the last matrix, whose part for added neurons is zero; elsewhere
            they are copies, so that the gradient of that part is not.
        """
        if self.inner not in weight.type:
            return weight
        if self.padding:
            weight = padded(weight, self.inner, self.padding, with_zeros=is_last)
        return weight if self.order is None else Take(weight, self.inner, self.order)


def padded(weight: Expr, axis: str, count: int, *, with_zeros: bool) -> Expr:
    """Return `weight` with `count` positions more of an axis: zeros, or copies of the first."""
    more = Slice(weight, axis, 0, count)
    return Concat((weight, Full(0.0, more.type) if with_zeros else more), axis)


def shared_part(weight: Expr, division: Division, *, is_last: bool) -> Expr:
    """Return the part of a dense weight that belongs to the shared expert."""
    if division.inner not in weight.type:
        return weight
    ordered = division.ordered(weight, is_last=is_last)
    return Slice(ordered, division.inner, 0, division.shared)


def lifted(weight: Expr, division: Division, *, is_last: bool = False) -> Expr:
    """Return a dense weight lifted over a leading axis ``expert``; an output bias is repeated."""
    inner = division.inner
    if inner not in weight.type:
        return Tile(weight, "expert", division.experts)
    weight = division.ordered(weight, is_last=is_last)
    if division.shared:
        weight = Slice(weight, inner, division.shared, division.dense)
    if division.slices == 1:
        return Tile(weight, "expert", division.copies)
    names = weight.type.names
    cut = Split(weight, inner, (("part", division.slices), (inner, division.width)))
    first = Permute(cut, ("part", *names))
    return Merge(Tile(first, "copy", division.copies), ("copy", "part"), "expert")


def branched(weight: Expr, division: Division, models: Sequence[str], *, is_last: bool) -> Expr:
    """Return a dense weight lifted over ``expert``, each copy from the model of its number."""
    single = replace(division, copies=1)
    parts = (lifted(read_from(weight, model), single, is_last=is_last) for model in models)
    return Concat(tuple(parts), "expert")


@dataclass(frozen=True)
class Noise:
    """Adds normal noise to every expert, each its own (Sparse Upcycling variants).

    Attributes:
      std: its standard deviation, absolute or in units of that of the dense tensor.
      relative: which of the two.
      seed: the seed of the conversion.
      block: the location of the block, by which the draws are keyed.
    """

    std: float
    relative: bool
    seed: int
    block: str

    def apply(self, name: str, dense: Expr, experts: Expr) -> Expr:
        """Return `experts`, made from the parameter `name` with the weight `dense`, with noise."""
        if self.std == 0:
            return experts
        key = derive_key(self.seed, f"{self.block}/{name}/noise")
        draw: Expr = Normal(_floats(experts.type), std=self.std, mean=0.0, key=key)
        if self.relative:
            draw = Mul(draw, Moment("std", dense))
        return Add(experts, draw)


@dataclass(frozen=True)
class Drop:
    """Redraws a share of the neurons of every expert (Drop-Upcycling, 2502.19261).

    One index set serves all matrices of an expert.  The new entries are normal, with the mean and
    standard deviation of those that they replace.

    Attributes:
      ratio: the share of neurons that are redrawn.
      seed: the seed of the conversion.
      block: the location of the block, by which the index sets are keyed.
      division: how the neurons are divided.
    """

    ratio: float
    seed: int
    block: str
    division: Division

    def apply(self, name: str, dense: Expr, experts: Expr) -> Expr:
        """Return `experts`, made from the parameter `name`, with some neurons redrawn."""
        division = self.division
        # The ratio is taken as the decimal number that was written: 0.29 of 100 neurons are 29.
        count = int(Fraction(repr(self.ratio)) * division.width)
        if count == 0 or division.inner not in experts.type:
            return experts
        axes = (Axis("expert", division.experts), Axis(division.inner, division.width))
        chosen = Subset(
            TensorType(PRED, axes),
            division.inner,
            count,
            key=derive_key(self.seed, f"{self.block}/drop"),
        )
        key = derive_key(self.seed, f"{self.block}/{name}/drop")
        normal = Normal(_floats(experts.type), std=1.0, mean=0.0, key=key)
        mean, std = (Moment(kind, experts, chosen, ("expert",)) for kind in _MOMENTS)
        return Select(chosen, Add(Mul(normal, std), mean), experts)


def _floats(type: TensorType) -> TensorType:
    return type.with_dtype(F32)


# The kinds of routing of ``upcycle``: what is emitted around the experts of a block.

LOOKS_AHEAD = ("expert-choice", "soft")
"""Kinds of routing in which later tokens affect earlier ones; in encoders only."""

NAMES = {"expert-choice": "expert choice", "soft": "a soft mixture"}


Perturb = Callable[[str, Expr, Expr], Expr]
"""Makes copies differ: from a parameter's name, its dense weight, and its lifted weight."""


@dataclass(frozen=True)
class UpcycleRecipe:
    """All inputs of the rewrite of a block.

    Attributes:
      item: the options.
      division: how the neurons are divided.
      router: the router's weight, ``[expert, embed]``; of a soft mixture ``[expert, slot, embed]``;
        a hash has none.
      factors: the factor of each parameter of the experts.
      perturb: makes copies differ.
      seed: the seed of a hash.
    """

    item: UpcycleOptions
    division: Division
    router: Expr | None
    factors: Mapping[Value, float]
    perturb: Perturb
    seed: int


def emit_router(
    builder: Builder, block: FFNBlock, recipe: UpcycleRecipe, prefix: str
) -> tuple[Value, Finish]:
    """Emit the routing; return the experts' rows and the function that combines their results.

    Args:
      builder: where operations are appended.
      block: the dense block, not yet rewritten.
      recipe: the inputs of the rewrite.
      prefix: the prefix of the names of new parameters.
    """
    item, b, x, embed = recipe.item, builder, block.x, block.outer
    tokens = tuple(n for n in x.type.names if n != embed)

    def param(name: str, weight: Expr) -> Value:
        graph, type = b.graph, weight.type.with_dtype(x.type.dtype)
        return graph.param(graph.fresh(f"{prefix}.{name}"), type, weight, loc=block.loc)

    if recipe.router is None:
        ids = token_ids(b.graph, x.type, tokens, block.loc)
        assert ids is not None, "checked before anything was changed"
        chosen, gates = emit_hash_routing(
            b, ids, x, experts=item.experts, top_k=item.top_k, seed=recipe.seed
        )
        return emit_chosen(
            b, x, chosen, gates, experts=item.experts, tokens=tokens, **item.assignment
        )
    weight = param("router.weight", recipe.router)
    if item.routing == "token-choice":
        bias = None
        if item.balance_bias:
            type = tensor(x.type.dtype, expert=item.experts)
            bias = param("router.balance_bias", Full(0.0, type))
        return emit_routing(
            b,
            x,
            weight,
            experts=item.experts,
            top_k=item.top_k,
            gates=item.law.convention,
            scale=item.gate_scale,
            tokens=tokens,
            bias=bias,
            **item.assignment,
        )
    if item.routing == "prototypes":
        logits = b.contract(x, weight, over=embed, precision="f32", name="router")
        chosen, gates = emit_prototypes(b, logits, item.top_k, gates="softmax")
        if item.law.convention == "renormalised":
            gates = b.div(gates, b.sum(gates, axes="choice"))
        if item.gate_scale != 1:
            gates = b.scale(gates, by=item.gate_scale)
        return emit_chosen(
            b, x, chosen, gates, experts=item.experts, tokens=tokens, **item.assignment
        )
    if item.routing == "expert-choice":
        # The gates of a token that is chosen at all add up to one.
        chosen, scores, slots = emit_expert_choice(
            b, x, weight, tokens=tokens, capacity_factor=item.capacity_factor, groups=item.groups
        )
        gates = emit_rescaled(b, scores, slots)
        rows = b.dispatch(x, chosen, slots)
        return rows, lambda rows_out: b.combine(rows_out, chosen, slots, gates)
    # The tokens of a sequence are mixed into slots; the logits are cosines times a learned scale.
    scale = param("router.scale", Full(1.0, tensor(x.type.dtype)))
    directions = b.mul(emit_unit(b, weight, embed), scale)
    rows, weights = emit_soft_slots(
        b, x, directions, tokens=tokens[-1], embed=embed, like=emit_unit(b, x, embed)
    )
    return rows, lambda rows_out: b.contract(weights, rows_out, over=("expert", "slot"))


# The weights of new routers: drawn from scratch, in one of several ways.


def repeated(rows: Expr, slices: int, name: str = "expert") -> Expr:
    """Return rows ``[copy, embed]``, each for all the slices of its group, over an axis `name`."""
    return Merge(Tile(rows, "part", slices, position=1), ("copy", "part"), name)


BOUNDS = {"truncated-normal": 3.0, "switch": 2.0}
"""Truncation bounds of draws, in standard deviations; Switch's are TensorFlow's."""


def left_of_std(init: str) -> float:
    """Return the ratio of the standard deviation of ``init`` after truncation to that before.

    The variance of a normal distribution cut at b is 1 − 2 b φ(b) / (2 Φ(b) − 1).
    """
    if init not in BOUNDS:
        return 1.0
    b = BOUNDS[init]
    density = exp(-b * b / 2) / sqrt(2 * pi)
    return sqrt(1 - 2 * b * density / erf(b / sqrt(2)))


def drawn(init: str, std: float, type: TensorType, key: int) -> Expr:
    """Return a router's weights, drawn from scratch with the standard deviation `std`."""
    if init == "zero" or std == 0:
        return Full(0.0, type)
    if init == "uniform":
        # A uniform distribution on [−a, a] has the standard deviation a / √3.
        bound = std * 3**0.5
        return Uniform(type, low=-bound, high=bound, key=key)
    if init in BOUNDS:
        return TruncatedNormal(type, std=std, key=key, bound=BOUNDS[init])
    return Normal(type, std=std, mean=0.0, key=key)


# How large the values are that a router reads, by the norm before it.


def input_rms(block: FFNBlock, read: ReadWeight) -> float:
    """Return the root mean square of the input of `block`.

    A normalised value has a unit mean square; the norm multiplies it by a vector and may add
    another, so that the mean square is that of the first plus that of the second.  Without a
    norm, or without weights to read, the answer is 1.
    """
    node = block.x.node
    if node is None or not node.op.is_norm:
        return 1.0
    square = 0.0
    for operand, role in zip(node.operands, node.op.roles, strict=True):
        if role is Role.VALUE:
            continue
        values = read(operand.weight) if operand.weight is not None else None
        if values is None:
            return 1.0
        square += float((values.astype("float64") ** 2).mean())
    return sqrt(square)


# Routers that follow from statistics of the model, and which statistics they need.

OTHER = "other"
"""The second axis of a square: covariances, counts of pairs."""


def statistic(block: FFNBlock, name: str, *axes: Axis, dtype: str = "f32") -> Source:
    """Return a statistic of the location of `block`."""
    type = TensorType(I32 if dtype == "i32" else F32, axes)
    return Source(name_in(STATISTICS, f"{block.loc}.{name}"), type)


def neuron_order(
    item: UpcycleOptions, block: FFNBlock, shared: int, seed: int, slots: str
) -> Expr | None:
    """Return the order that the neurons of a block are divided in; None for their own.

    Args:
      item: the options.
      block: the block.
      shared: the neurons of the shared expert.
      seed: of the conversion.
      slots: the key of the block's draws.
    """
    padding = item.padding(block.width, shared)
    if item.split == "random":
        neurons = Axis(block.inner, block.width + padding)
        return Permutation(TensorType(I32, (neurons,)), derive_key(seed, f"{slots}/split"))
    if item.split == "activation":
        neurons, others = Axis(block.inner, block.width), Axis(OTHER, block.width)
        pairs: Expr = statistic(block, "hidden.pairs", neurons, others, dtype="i32")
        for axis in (block.inner, OTHER) if padding else ():
            # What is added is never active.
            pairs = padded(pairs, axis, padding, with_zeros=True)
        return Clusters(pairs, block.inner, shared, item.experts)
    return None


def fitted_weight(
    item: UpcycleOptions, block: FFNBlock, division: Division, texts: tuple[str, ...]
) -> Expr:
    """Return the rows of a router that is fitted to statistics, ``[expert, embed]``.

    Args:
      item: the options.
      block: the block.
      division: how its neurons are divided.
      texts: the texts of the statistics.
    """
    embed, inner = block.x.type[block.outer], block.inner
    cross: Expr
    if item.is_split:
        # The covariances with the mean size of each part's neurons, ordered in the layout of the
        # statistics: a row of them is read once, not once a neuron.
        neurons = Axis(inner, block.width)
        parts = division.ordered(statistic(block, "hidden.cross", embed, neurons), is_last=True)
        if division.shared:
            parts = Slice(parts, inner, division.shared, division.dense)
        cut = Split(parts, inner, (("expert", division.slices), (inner, division.width)))
        moment = Moment("mean", cut, None, (embed.name, "expert"))
        cross = Permute(moment, ("expert", embed.name))
    else:
        # The covariances with which text a token is of, those of the experts' texts.
        cross = statistic(block, "texts.cross", Axis("text", len(texts)), embed)
        if item.models:
            rows = tuple(Index(cross, "text", texts.index(name)) for name in item.models)
            cross = Stack(rows, "expert")
        else:
            cross = Rename(cross, "text", "expert")
    fitted = Fitted(
        statistic(block, "input.covariance", embed, Axis(OTHER, embed.size)),
        statistic(block, "input.mean", embed),
        cross,
        item.router_ridge if item.router_init == "ridge" else 0.0,
        item.router_std,
    )
    if item.is_split or division.slices == 1:
        return fitted
    return repeated(Rename(fitted, "expert", "copy"), division.slices)


def unread(item: UpcycleOptions, statistics: Statistics | None) -> list[Problem]:
    """Return why statistics do not suit the options, whatever the model."""
    if not (item.is_fitted or item.split == "activation"):
        return []
    if statistics is None:
        return [NO_STATISTICS]
    if not item.is_fitted or item.is_split:
        return []
    copies = item.experts // item.granularity
    if item.models:
        return [
            Problem(
                "no text has the name of the model",
                "sources",
                ", ".join(statistics.texts),
                name,
                f"moecc capture --text {name}=FILE",
            )
            for name in dict.fromkeys(item.models)
            if name not in statistics.texts
        ]
    if len(statistics.texts) == copies:
        return []
    return [
        Problem(
            "each copy has a text that it is for",
            "router-init",
            f"{copies} texts",
            ", ".join(statistics.texts),
            "moecc capture --text A --text B …",
        )
    ]


def missing(item: UpcycleOptions, block: FFNBlock, statistics: Statistics | None) -> Problem | None:
    """Return which statistic of a block is missing or of another shape, or None."""
    if statistics is None:
        return None
    embed, width = block.embed, block.width
    shapes: dict[str, tuple[int, ...]] = {}
    if item.split == "activation":
        shapes["hidden.pairs"] = (width, width)
    if item.is_fitted:
        shapes |= {"input.covariance": (embed, embed), "input.mean": (embed,)}
        if item.is_split:
            shapes["hidden.cross"] = (embed, width)
        else:
            shapes["texts.cross"] = (len(statistics.texts), embed)
    return statistics.problem(block.loc, shapes)
