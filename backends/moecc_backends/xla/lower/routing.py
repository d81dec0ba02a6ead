"""Lowering of routing: the choice of experts, their slots, dispatch and combine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from jax import Array

from moecc.ir.conventions import convention
from moecc.ir.graph import Node, Value
from moecc.ir.operation import Attrs
from moecc.ir.ops.routing import HashExpertsOp, KeepChoicesOp, RouteOp, WithinBufferOp, buffer_rows
from moecc.ir.ops.slots import SlotsOp, capacity, group_count
from moecc_backends.xla.dispatch.choose import plan_dispatch
from moecc_backends.xla.dispatch.rounds import InRounds, RoundSpec, exchanged_once
from moecc_backends.xla.dispatch.sorted_rows import SortedRows, rank_in_expert, sort_by_expert
from moecc_backends.xla.lower.contract import is_precise, softmax
from moecc_backends.xla.trace.context import TraceContext, lowering, lowering_along
from moecc_backends.xla.trace.values import (
    Deferred,
    DeferredRows,
    DispatchLayout,
    Named,
    Operand,
    Routing,
    Rows,
    accumulator,
    elementwise,
    lifted,
    lifted_all,
)


@lowering("route")
def _route(ctx: TraceContext, node: Node, logits: Operand, *bias: Named) -> tuple[Operand, ...]:
    attrs = RouteOp.of_node(node)

    def choose(full: Named) -> tuple[Named, Named]:
        outer = tuple(a for a in full.axes if a != attrs.axis)
        scores = full.to((*outer, attrs.axis)).array
        if attrs.precision == "f32":
            scores = scores.astype(accumulator(scores.dtype))
        if bias:
            ranked = _scores(attrs.gates, scores) + bias[0].array.astype(scores.dtype)
            _, experts = jax.lax.top_k(jax.lax.stop_gradient(ranked), attrs.top_k)
            best = jnp.take_along_axis(scores, experts, axis=-1)
        else:
            best, experts = jax.lax.top_k(scores, attrs.top_k)
        gates = GATES[attrs.gates](scores, best, experts) * attrs.scale
        axes = (*outer, attrs.choice)
        return Named(experts.astype(jnp.int32), axes), Named(gates, axes)

    return lifted_all(logits, choose)


def _scores(kind: str, logits: Array) -> Array:
    """Return what a bias for choosing is added to."""
    is_sigmoid = convention(kind).score == "sigmoid"
    return jax.nn.sigmoid(logits) if is_sigmoid else jax.nn.softmax(logits, axis=-1)


def _shares(chosen: Array) -> Array:
    return chosen / chosen.sum(-1, keepdims=True)


def _sparsemixer(scores: Array, best: Array, experts: Array) -> Array:
    """Each choice's softmax among the logits near it; earlier choices no longer take part."""
    left, gates = scores, []
    for k in range(experts.shape[-1]):
        top = best[..., k : k + 1]
        distance = (top - scores) / jnp.maximum(jnp.abs(scores), top)
        near = jnp.where(distance > 0.02, -jnp.inf, left)
        gates.append(jnp.take_along_axis(softmax(near, -1), experts[..., k : k + 1], -1))
        chosen = jax.nn.one_hot(experts[..., k], scores.shape[-1], dtype=bool)
        left = jnp.where(chosen, -jnp.inf, left)
    return jnp.concatenate(gates, axis=-1)


GATES: dict[str, Callable[[Array, Array, Array], Array]] = {
    "renormalised": lambda scores, best, experts: softmax(best, -1),
    "softmax": lambda scores, best, experts: jnp.take_along_axis(softmax(scores, -1), experts, -1),
    "sigmoid": lambda scores, best, experts: jax.nn.sigmoid(best),
    "sigmoid-renormalised": lambda scores, best, experts: _shares(jax.nn.sigmoid(best)),
    "sparsemixer": _sparsemixer,
    "ones": lambda scores, best, experts: jnp.ones_like(best),
}
"""By convention, see ``route`` in the operation table: gates of scores, of the scores that were
chosen, and of the experts that were."""


@lowering("keep_choices")
def _keep_choices(ctx: TraceContext, node: Node, gates: Operand, *uniform: Operand) -> Operand:
    attrs = KeepChoicesOp.of_node(node)
    policy, threshold = attrs.policy, attrs.threshold

    def decide(full: Named) -> Named:
        first = (jnp.arange(full.size(attrs.choice)) == 0).reshape(
            [-1 if a == attrs.choice else 1 for a in full.axes]
        )
        keep = jnp.full(full.array.shape, policy == "all")
        if policy == "threshold":
            keep = full.array > threshold
        if policy == "random":
            keep = _plain(uniform[0]).to(full.axes).array < full.array / max(threshold, 1e-9)
        return Named(keep | first, full.axes)

    return lifted(gates, decide)


def _plain(x: Operand) -> Named:
    return x.inner() if isinstance(x, Rows) else x


def _hashed(ids: Array, seed: int) -> Array:
    h = ids ^ jnp.uint32(seed * 0x9E3779B9 % 2**32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * jnp.uint32(factor)
    return h ^ (h >> 16)


@lowering_along("hash_experts")
def _hash_experts(ctx: TraceContext, node: Node, ids: Named) -> Named:
    attrs = HashExpertsOp.of_node(node)
    number = ids.array.astype(jnp.uint32)
    if attrs.hash != "modulo":
        number = _hashed(number, attrs.seed)
    first = (number % jnp.uint32(attrs.experts)).astype(jnp.int32)
    chosen = (first[..., None] + jnp.arange(attrs.top_k, dtype=jnp.int32)) % attrs.experts
    return Named(chosen, (*ids.axes, attrs.choice))


# Lowering of slots: who gets one at which expert; there a strategy lays out rows.
#
# It is the same on one device, under `shard_map` and for XLA's partitioner.  What the partitioner
# must not mix, the tokens of several groups, the interceptor of the context keeps apart.


def _plan(ctx: TraceContext, slots: Value, routing: Routing) -> None:
    """Lay out the rows of `routing`, as the interceptor must have it, or as is best here."""
    layout = ctx.interceptor.layout(routing)
    if layout is None:
        layout = plan_dispatch(slots, routing, ctx.options, ctx.dtype)
    if isinstance(layout, SortedRows) and ctx.view.mesh is not None:
        mesh = exchanged_once(slots)
        if mesh is not None:
            spec = RoundSpec.of(routing, mesh, ctx.view.mesh.size(mesh))
            layout = InRounds(layout.routing, layout, spec, ctx.view)
    ctx.layouts[slots] = layout


@lowering("assign_slots")
def _assign(ctx: TraceContext, node: Node, experts: Named, *extras: Named) -> Operand:
    attrs = ctx.view.attrs(node)
    tokens: tuple[str, ...] = attrs["tokens"]
    (choice,) = (a for a in experts.axes if a not in tokens)
    sizes = tuple(experts.size(a) for a in tokens)
    chosen = experts.to((*tokens, choice)).array.reshape(prod(sizes), experts.size(choice))
    groups = group_count(attrs, chosen.shape[0])
    more = dict(zip(attrs["using"], extras, strict=True))
    layout = (*tokens, choice)
    wanted = None
    if not _always_names_experts(node.operands[0]):
        wanted = (chosen >= 0) & (chosen < SlotsOp.of_node(node).experts)
    if "keep" in more:
        keep = more["keep"].to(layout).array.reshape(chosen.shape)
        wanted = keep if wanted is None else wanted & keep
    if "mask" in more:
        mask = more["mask"].to(layout[:-1]).array.reshape(-1, 1)
        wanted = jnp.broadcast_to(mask, chosen.shape) if wanted is None else wanted & mask
    wanted = wanted
    priority = more["priority"].to(tokens).array.reshape(-1) if "priority" in more else None
    rank, limit = partial(_ranks_in_experts, attrs), None
    if attrs["slots"] == "capacity":
        limit = capacity(attrs, chosen.shape[0] // max(groups, 1), chosen.shape[1])
        slots = ctx.interceptor.by_group(rank, groups, (chosen, wanted, priority))
        slots = jnp.where(slots < limit, slots, -1)
    else:
        # Rows are sorted over all groups: nothing is gained by ranking them apart.
        slots = rank(groups, chosen, wanted, priority)
    routing = Routing(chosen, slots, wanted, attrs["experts"], groups, limit, tokens, sizes)
    _plan(ctx, node.result, routing)
    shape = (*sizes, chosen.shape[1])
    return Named(slots.reshape(shape), (*tokens, choice)).to(experts.axes)


def _always_names_experts(experts: Value) -> bool:
    return experts.node is not None and experts.node.op.name in ("route", "hash_experts")


def _ranks_in_experts(
    attrs: Attrs,
    groups: int,
    chosen: Array,
    wanted: Array | None,
    priority: Array | None,
) -> Array:
    """Return how many choices of one group and expert come before each, −1 where not `wanted`.

    Args:
      attrs: of the node.
      groups: the number of token groups.
      chosen: the expert of each choice, ``[tokens, choice]``.
      wanted: which choices ask for a slot, likewise; None if all do.
      priority: tokens take their turns by falling priority, ``[tokens]``; None: in their order.
    """
    experts = attrs["experts"]
    group = jnp.arange(chosen.shape[0], dtype=jnp.int32) // max(chosen.shape[0] // groups, 1)
    keys = chosen + group[:, None] * experts
    if wanted is not None:
        # What is left out may name no expert at all, so its key must not be looked up.
        keys = jnp.where(wanted, keys, 0)
    order = None if priority is None else jnp.argsort(-priority, stable=True)
    if order is not None:
        keys, wanted = keys[order], None if wanted is None else wanted[order]
    if attrs["order"] == "choice":
        keys, wanted = keys.T, None if wanted is None else wanted.T
    ranks = rank_in_expert(sort_by_expert(keys, groups * experts, wanted), keys)
    if wanted is not None:
        ranks = jnp.where(wanted, ranks, -1)
    ranks = ranks.T if attrs["order"] == "choice" else ranks
    return ranks if order is None else jnp.zeros_like(ranks).at[order].set(ranks)


@lowering("expert_choice")
def _expert_choice(
    ctx: TraceContext, node: Node, scores: Named, *mask: Named
) -> tuple[Operand, ...]:
    attrs = ctx.view.attrs(node)
    tokens: tuple[str, ...] = attrs["tokens"]
    sizes = tuple(scores.size(a) for a in tokens)
    values = scores.to((*tokens, attrs["axis"])).array.reshape(prod(sizes), -1)
    groups = group_count(attrs, values.shape[0])
    limit = capacity(attrs, values.shape[0] // max(groups, 1), 1)
    ranked = values
    if mask:
        ranked = jnp.where(mask[0].to(tokens).array.reshape(-1, 1), values, -jnp.inf)
    experts = jnp.broadcast_to(jnp.arange(attrs["experts"], dtype=jnp.int32), values.shape)
    slots = _taken(jax.lax.stop_gradient(ranked), groups, limit)
    routing = Routing(experts, slots, None, attrs["experts"], groups, limit, tokens, sizes)
    _plan(ctx, node.results[-1], routing)
    layout = (*tokens, attrs["choice"])
    every = (*(a for a in scores.axes if a != attrs["axis"]), attrs["choice"])
    results = (Named(a.reshape(*sizes, -1), layout).to(every) for a in (experts, values, slots))
    return tuple(results)


def _taken(ranked: Array, groups: int, limit: int) -> Array:
    """Return the slot of each token at each expert, or −1: ``[token, expert]``."""
    size = ranked.shape[0] // max(groups, 1)
    columns = ranked.reshape(groups, size, -1).swapaxes(1, 2)
    best, index = jax.lax.top_k(columns, min(limit, size))
    slot = jnp.where(best > -jnp.inf, jnp.arange(best.shape[-1], dtype=jnp.int32), -1)
    slots = jnp.full(columns.shape, -1, jnp.int32)
    slots = jnp.put_along_axis(slots, index, slot, axis=-1, inplace=False)
    return slots.swapaxes(1, 2).reshape(ranked.shape)


@lowering("group_sum")
def _group_sum(ctx: TraceContext, node: Node, x: Named, slots: Named) -> Operand:
    (attrs,) = (ctx.view.attrs(v.node) for v in node.operands[1:] if v.node is not None)
    tokens: tuple[str, ...] = attrs["tokens"]
    inner = tuple(a for a in x.axes if a not in tokens)
    source = x.to((*tokens, *inner)).array
    flat = source.reshape(prod(source.shape[: len(tokens)]), *source.shape[len(tokens) :])
    groups = group_count(attrs, flat.shape[0])
    parts = flat.reshape(groups, flat.shape[0] // max(groups, 1), *flat.shape[1:])
    total = jnp.sum(parts.astype(accumulator(ctx.dtype)), axis=1).astype(x.array.dtype)
    return Named(total, ("group", *inner))


# Lowering of dispatch and combine: what the strategy of their routing makes of them.


@lowering("dispatch")
def _dispatch(
    ctx: TraceContext, node: Node, x: Named, experts: Named, slots: Named
) -> Operand | Deferred:
    return ctx.layouts[node.operands[2]].permute(x)


@lowering("dispatch_gates")
def _dispatch_gates(
    ctx: TraceContext, node: Node, gates: Named, experts: Named, slots: Named
) -> Operand | Deferred:
    layout = ctx.layouts[node.operands[2]]
    return layout.permute_gates(_by_token(gates, layout))


@lowering("weight_rows")
def _weight_rows(ctx: TraceContext, node: Node, rows: Operand, gates: Operand) -> Operand:
    def weighted(x: Array, weights: Array) -> Array:
        wide = jnp.promote_types(accumulator(x.dtype), weights.dtype)
        kind = wide if is_precise(node) else x.dtype
        return (x.astype(kind) * weights.astype(kind)).astype(x.dtype)

    return elementwise(weighted, rows, gates)


@lowering("combine", "combine_weighted", takes_deferred=True)
def _combine(
    ctx: TraceContext,
    node: Node,
    rows: Operand | DeferredRows,
    experts: Named,
    slots: Named,
    gates: Named | None = None,
) -> Operand:
    layout = _layout_of(ctx, node.operands[0], rows, ctx.layouts[node.operands[2]])
    tokens = layout.routing.tokens
    tokens_out = layout.unpermute(rows, None if gates is None else _by_token(gates, layout))
    outer = tuple(a for a in node.result.type.names if a in tokens)
    return tokens_out.to((*outer, *(a for a in tokens_out.axes if a not in tokens)))


def _by_token(gates: Named, layout: DispatchLayout) -> Array:
    """Return gates ``[tokens, choice]``, all token axes flattened."""
    tokens = layout.routing.tokens
    (choice,) = (a for a in gates.axes if a not in tokens)
    array = gates.to((*tokens, choice)).array
    return array.reshape(layout.routing.num_tokens, gates.size(choice))


def _layout_of(
    ctx: TraceContext, value: Value, rows: Operand | DeferredRows, planned: DispatchLayout
) -> DispatchLayout:
    """Return the layout of `rows`: on a mesh, a device may have those of some experts alone."""
    if isinstance(rows, Rows):
        return rows.layout
    parts = ctx.view.shard_count(value.type["expert"])
    if parts == 1:
        return planned
    count = planned.routing.num_experts // parts
    return planned.of_experts(ctx.view.offset(value.type["expert"], count), count)


# Lowering of bounded receive buffers, where a program sees the tokens of all groups.


@lowering("within_buffer")
def _within_buffer(
    ctx: TraceContext, node: Node, experts: Named, slots: Named, counts: Named
) -> Named:
    attrs, tokens = ctx.view.attrs(node), WithinBufferOp.of_node(node).tokens
    (choice,) = (a for a in experts.axes if a not in tokens)
    layout = (*tokens, choice)
    full = experts.to(layout).array
    chosen, ranks = (x.to(layout).array.reshape(-1, full.shape[-1]) for x in (experts, slots))
    counted = counts.to(("group", "expert")).array.astype(jnp.int32)
    groups, num_experts = counted.shape
    blocks, parts = attrs["blocks"], attrs["parts"]
    mine = groups // (1 if ctx.view.mesh is None else ctx.view.mesh.size(_over(node)))
    each = chosen.shape[0] // mine
    rows = buffer_rows(attrs, each * groups // blocks, chosen.shape[1])
    cells = counted.reshape(blocks, groups // blocks, parts, num_experts // parts)
    line = cells.transpose(0, 2, 1, 3).reshape(blocks, parts, -1)
    room = jnp.clip(rows - (jnp.cumsum(line, -1) - line), 0, line)
    back = room.reshape(blocks, parts, groups // blocks, num_experts // parts)
    limit = back.transpose(0, 2, 1, 3).reshape(groups, num_experts)
    first = ctx.view.shard_index(_over(node)) * mine
    group = first + jnp.arange(chosen.shape[0]) // max(each, 1)
    there = (ranks >= 0) & (chosen >= 0) & (chosen < num_experts)
    keep = there & (ranks < limit[group[:, None], jnp.where(there, chosen, 0)])
    return Named(keep.reshape(full.shape), layout).to(experts.axes)


def _over(node: Node) -> tuple[str, ...]:
    """Return the mesh axes along which the counts are of all tokens, and the tokens of some."""
    tokens = node.operands[0].type[WithinBufferOp.of_node(node).tokens[0]].mesh
    return tokens[len(node.operands[2].type["group"].mesh) :]
