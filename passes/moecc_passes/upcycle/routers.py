"""The kinds of routing of ``upcycle``: what is emitted around the experts of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import erf, exp, pi, sqrt

from moecc.analysis import FFNBlock
from moecc.errors import Problem
from moecc.ir.attributes import Gates
from moecc.ir.builder import Builder
from moecc.ir.graph import Value
from moecc.ir.moe import (
    Finish,
    SlotOptions,
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
from moecc.pipeline.passes import NO_STATISTICS, ReadWeight, Statistics
from moecc.types import F32, Axis, TensorType, tensor
from moecc.weights.arithmetic import Moment
from moecc.weights.branches import STATISTICS, name_in
from moecc.weights.draws import Normal, TruncatedNormal, Uniform, derive_key
from moecc.weights.expr import Expr, Full, Source
from moecc.weights.fits import Fitted
from moecc.weights.movement import (
    I32,
    Clusters,
    Index,
    Merge,
    Permutation,
    Permute,
    Rename,
    Slice,
    Split,
    Stack,
    Tile,
)
from moecc_passes.inputs import token_ids
from moecc_passes.upcycle.lift import Division, padded
from moecc_passes.upcycle.options import UpcycleOptions

LOOKS_AHEAD = ("expert-choice", "soft")
"""Kinds of routing in which later tokens affect earlier ones; in encoders only."""

NAMES = {"expert-choice": "expert choice", "soft": "a soft mixture"}


@dataclass(frozen=True)
class Router:
    """How the tokens of a block are routed to the experts.

    Attributes:
      kind: token-choice, prototypes, hash, expert-choice or soft.
      weight: the router's weight, ``[expert, embed]``; of a soft mixture ``[expert, slot, embed]``;
        a hash has none.
      experts: the number of experts.
      top_k: experts per token, if the kind has a fixed number.
      gates: the gate convention, as in ``route``.
      gate_scale: the factor on the gates.
      has_bias: whether a bias for loss-free balancing takes part in the choice.
      seed: the seed of the hash.
      assignment: the attributes of ``assign_slots``: slots, capacity_factor and so on.
    """

    kind: str
    weight: Expr | None
    experts: int
    top_k: int
    gates: Gates
    gate_scale: float
    has_bias: bool
    seed: int
    assignment: SlotOptions

    def emit(self, builder: Builder, block: FFNBlock, prefix: str) -> tuple[Value, Finish]:
        """Emit the routing; return the experts' rows and the function that combines their results.

        Args:
          builder: where operations are appended.
          block: the dense block, not yet rewritten.
          prefix: the prefix of the names of new parameters.
        """
        return _EMIT[self.kind](_Place(builder, block, prefix), self)


@dataclass(frozen=True)
class _Place:
    """The position and inputs of an emitted routing."""

    builder: Builder
    block: FFNBlock
    prefix: str

    @property
    def x(self) -> Value:
        return self.block.x

    @property
    def tokens(self) -> tuple[str, ...]:
        return tuple(n for n in self.x.type.names if n != self.block.outer)

    def param(self, name: str, weight: Expr) -> Value:
        graph = self.builder.graph
        type = weight.type.with_dtype(self.x.type.dtype)
        return graph.param(graph.fresh(f"{self.prefix}.{name}"), type, weight, loc=self.block.loc)

    def router(self, router: Router) -> Value:
        assert router.weight is not None, "only a hash has no weight"
        return self.param("router.weight", router.weight)


def _token_choice(at: _Place, router: Router) -> tuple[Value, Finish]:
    weight = at.router(router)
    bias = None
    if router.has_bias:
        type = tensor(at.x.type.dtype, expert=router.experts)
        bias = at.param("router.balance_bias", Full(0.0, type))
    return emit_routing(
        at.builder, at.x, weight, experts=router.experts, top_k=router.top_k, gates=router.gates,
        scale=router.gate_scale, tokens=at.tokens, bias=bias, **router.assignment,
    )  # fmt: skip


def _prototypes(at: _Place, router: Router) -> tuple[Value, Finish]:
    b, weight = at.builder, at.router(router)
    logits = b.contract(at.x, weight, over=at.block.outer, precision="f32", name="router")
    chosen, gates = emit_prototypes(b, logits, router.top_k, gates="softmax")
    if router.gates == "renormalised":
        gates = b.div(gates, b.sum(gates, axes="choice"))
    if router.gate_scale != 1:
        gates = b.scale(gates, by=router.gate_scale)
    return _placed(at, router, chosen, gates)


def _hash(at: _Place, router: Router) -> tuple[Value, Finish]:
    ids = token_ids(at.builder.graph, at.x.type, at.tokens, at.block.loc)
    assert ids is not None, "checked before anything was changed"
    chosen, gates = emit_hash_routing(
        at.builder, ids, at.x, experts=router.experts, top_k=router.top_k, seed=router.seed
    )
    return _placed(at, router, chosen, gates)


def _placed(at: _Place, router: Router, chosen: Value, gates: Value) -> tuple[Value, Finish]:
    return emit_chosen(
        at.builder, at.x, chosen, gates, experts=router.experts, tokens=at.tokens,
        **router.assignment,
    )  # fmt: skip


def _expert_choice(at: _Place, router: Router) -> tuple[Value, Finish]:
    """Let experts choose tokens; the gates of a token that is taken at all add up to one."""
    b, weight = at.builder, at.router(router)
    factor, groups = router.assignment["capacity_factor"], router.assignment["groups"]
    chosen, scores, slots = emit_expert_choice(
        b, at.x, weight, tokens=at.tokens, capacity_factor=factor, groups=groups
    )
    gates = emit_rescaled(b, scores, slots)
    rows = b.dispatch(at.x, chosen, slots)

    def finish(rows_out: Value) -> Value:
        return b.combine(rows_out, chosen, slots, gates)

    return rows, finish


def _soft(at: _Place, router: Router) -> tuple[Value, Finish]:
    """Mix the tokens of a sequence into slots; the logits are cosines times a learned scale."""
    b, weight = at.builder, at.router(router)
    scale = at.param("router.scale", Full(1.0, tensor(at.x.type.dtype)))
    slots = b.mul(emit_unit(b, weight, at.block.outer), scale)
    logits_of = emit_unit(b, at.x, at.block.outer)
    rows, weights = emit_soft_slots(
        b, at.x, slots, tokens=at.tokens[-1], embed=at.block.outer, like=logits_of
    )

    def finish(rows_out: Value) -> Value:
        return b.contract(weights, rows_out, over=("expert", "slot"))

    return rows, finish


_EMIT: dict[str, Callable[[_Place, Router], tuple[Value, Finish]]] = {
    "token-choice": _token_choice,
    "prototypes": _prototypes,
    "hash": _hash,
    "expert-choice": _expert_choice,
    "soft": _soft,
}
"""The functions that emit each kind, by the words of the option ``routing``."""


# The weights of new routers: drawn from scratch, in one of several ways.


def router_weight(
    init: str, std: float, embed: Axis, division: Division, *, key: int, name: str = "expert"
) -> Expr:
    """Return the router's rows: one draw a group, repeated for the slices of the group.

    Args:
      init: normal, truncated-normal, switch, uniform or zero.
      std: the standard deviation of the entries.
      embed: the axis of the model's width.
      division: the numbers of groups and slices.
      key: the key of the draw.
      name: the name of the axis of experts.
    """
    copies = Axis(name if division.slices == 1 else "copy", division.copies)
    draw = _drawn(init, std, TensorType(F32, (copies, embed)), key)
    return draw if division.slices == 1 else repeated(draw, division.slices, name)


def repeated(rows: Expr, slices: int, name: str = "expert") -> Expr:
    """Return rows ``[copy, embed]``, each for all the slices of its group, over an axis `name`."""
    return Merge(Tile(rows, "part", slices, position=1), ("copy", "part"), name)


def slot_weight(init: str, std: float, embed: Axis, experts: int, slots: int, *, key: int) -> Expr:
    """Return the weight ``[expert, slot, embed]`` that makes the slots of a soft mixture."""
    axes = (Axis("expert", experts), Axis("slot", slots), embed)
    return _drawn(init, std, TensorType(F32, axes), key)


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


def _drawn(init: str, std: float, type: TensorType, key: int) -> Expr:
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
    embed = block.x.type[block.outer]
    cross = _of_parts(block, division, embed) if item.is_split else _of_texts(item, block, texts)
    rows = Fitted(
        statistic(block, "input.covariance", embed, Axis(OTHER, embed.size)),
        statistic(block, "input.mean", embed), cross,
        item.router_ridge if item.router_init == "ridge" else 0.0, item.router_std,
    )  # fmt: skip
    if item.is_split or division.slices == 1:
        return rows
    return repeated(Rename(rows, "expert", "copy"), division.slices)


def _of_parts(block: FFNBlock, division: Division, embed: Axis) -> Expr:
    """Return the covariances with the mean size of each part's neurons."""
    inner = block.inner
    cross = statistic(block, "hidden.cross", embed, Axis(inner, block.width))
    # Ordered in its own layout: a row of the statistics is read once, not once a neuron.
    whole = division.ordered(cross, is_last=True)
    parts = Slice(whole, inner, division.shared, division.dense) if division.shared else whole
    cut = Split(parts, inner, (("expert", division.slices), (inner, division.width)))
    return Permute(Moment("mean", cut, None, (embed.name, "expert")), ("expert", embed.name))


def _of_texts(item: UpcycleOptions, block: FFNBlock, texts: tuple[str, ...]) -> Expr:
    """Return the covariances with which text a token is of, those of the experts' texts."""
    embed = block.x.type[block.outer]
    cross = statistic(block, "texts.cross", Axis("text", len(texts)), embed)
    if not item.models:
        return Rename(cross, "text", "expert")
    rows = tuple(Index(cross, "text", texts.index(name)) for name in item.models)
    return Stack(rows, "expert")


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
            Problem("no text has the name of the model", "sources", ", ".join(statistics.texts),
                    name, f"moecc capture --text {name}=FILE")
            for name in dict.fromkeys(item.models) if name not in statistics.texts
        ]  # fmt: skip
    if len(statistics.texts) == copies:
        return []
    return [Problem(
        "each copy has a text that it is for", "router-init",
        f"{copies} texts", ", ".join(statistics.texts), "moecc capture --text A --text B …",
    )]  # fmt: skip


def missing(item: UpcycleOptions, block: FFNBlock, statistics: Statistics | None) -> Problem | None:
    """Return which statistic of a block is missing or of another shape, or None."""
    if statistics is None:
        return None
    return statistics.problem(block.loc, dict(_wanted(item, block, statistics)))


def _wanted(
    item: UpcycleOptions, block: FFNBlock, statistics: Statistics
) -> Iterator[tuple[str, tuple[int, ...]]]:
    embed, width = block.embed, block.width
    if item.split == "activation":
        yield "hidden.pairs", (width, width)
    if item.is_fitted:
        yield "input.covariance", (embed, embed)
        yield "input.mean", (embed,)
        if item.is_split:
            yield "hidden.cross", (embed, width)
        else:
            yield "texts.cross", (len(statistics.texts), embed)
