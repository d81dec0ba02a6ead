"""Lowering of routing: the choice of experts, their slots, dispatch and combine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from math import prod

import jax
import jax.numpy as jnp
from jax import Array, lax

from moecc.ir.conventions import convention
from moecc.ir.graph import Node, Value
from moecc.ir.operation import Attrs
from moecc.ir.ops.routing import HashExpertsOp, KeepChoicesOp, RouteOp, WithinBufferOp, buffer_rows
from moecc.ir.ops.slots import SlotsOp, capacity, group_count
from moecc_backends.xla.dispatch.choose import plan_dispatch
from moecc_backends.xla.dispatch.rounds import InRounds, RoundSpec, exchanged_once
from moecc_backends.xla.dispatch.sorted_rows import SortedRows, rank_in_expert, sort_by_expert
from moecc_backends.xla.kernels.grouped_matmul import starts_of
from moecc_backends.xla.lower.contract import is_precise, softmax
from moecc_backends.xla.trace.context import TraceContext, lowering, lowering_along
from moecc_backends.xla.trace.values import (
    Deferred,
    DeferredRows,
    Named,
    Names,
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
            # A bias is added to what gates are made of.
            is_sigmoid = convention(attrs.gates).score == "sigmoid"
            score = jax.nn.sigmoid(scores) if is_sigmoid else jax.nn.softmax(scores, axis=-1)
            each = bias[0] if len(bias[0].axes) == 1 else bias[0].to((*outer, attrs.axis))
            ranked = score + each.array.astype(scores.dtype)
            _, experts = lax.top_k(lax.stop_gradient(ranked), attrs.top_k)
            best = jnp.take_along_axis(scores, experts, axis=-1)
        else:
            best, experts = lax.top_k(scores, attrs.top_k)
        gates = GATES[attrs.gates](scores, best, experts) * attrs.scale
        axes = (*outer, attrs.choice)
        return Named(experts.astype(jnp.int32), axes), Named(gates, axes)

    return lifted_all(logits, choose)


def _shares(chosen: Array) -> Array:
    return chosen / chosen.sum(-1, keepdims=True)


def _sparsemixer(scores: Array, best: Array, experts: Array) -> Array:
    """Return each choice's softmax among the logits near it, earlier choices left out."""
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
            drawn = uniform[0].inner() if isinstance(uniform[0], Rows) else uniform[0]
            keep = drawn.to(full.axes).array < full.array / max(threshold, 1e-9)
        return Named(keep | first, full.axes)

    return lifted(gates, decide)


@lowering_along("hash_experts")
def _hash_experts(ctx: TraceContext, node: Node, ids: Named) -> Named:
    attrs = HashExpertsOp.of_node(node)
    number = ids.array.astype(jnp.uint32)
    if attrs.hash != "modulo":
        number = number ^ jnp.uint32(attrs.seed * 0x9E3779B9 % 2**32)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            number = (number ^ (number >> shift)) * jnp.uint32(factor)
        number = number ^ (number >> 16)
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


def _flat(x: Named, tokens: Names) -> Array:
    """Return ``[tokens, …]``, all token axes flattened."""
    array = x.to((*tokens, *(a for a in x.axes if a not in tokens))).array
    return array.reshape(prod(array.shape[: len(tokens)]), *array.shape[len(tokens) :])


@lowering("assign_slots")
def _assign(ctx: TraceContext, node: Node, experts: Named, *extras: Named) -> Operand:
    attrs = ctx.view.attrs(node)
    tokens: Names = attrs["tokens"]
    (choice,) = (a for a in experts.axes if a not in tokens)
    chosen = _flat(experts, tokens)
    groups = group_count(attrs, chosen.shape[0])
    more = {word: _flat(x, tokens) for word, x in zip(attrs["using"], extras, strict=True)}
    conditions = [
        jnp.broadcast_to(more[word] if word == "keep" else more[word][:, None], chosen.shape)
        for word in ("keep", "mask")
        if word in more
    ]
    source = node.operands[0].node
    if source is None or source.op.name not in ("route", "hash_experts"):
        # Others may name no expert at all.
        conditions.append((chosen >= 0) & (chosen < SlotsOp.of_node(node).experts))
    wanted = reduce(jnp.logical_and, conditions) if conditions else None
    rank, limit = partial(_ranks_in_experts, attrs), None
    if attrs["slots"] == "capacity":
        limit = capacity(attrs, chosen.shape[0] // max(groups, 1), chosen.shape[1])
        slots = ctx.interceptor.by_group(rank, groups, (chosen, wanted, more.get("priority")))
        slots = jnp.where(slots < limit, slots, -1)
    else:
        # Rows are sorted over all groups: nothing is gained by ranking them apart.
        slots = rank(groups, chosen, wanted, more.get("priority"))
    sizes = tuple(map(experts.size, tokens))
    routing = Routing(chosen, slots, wanted, attrs["experts"], groups, limit, tokens, sizes)
    _plan(ctx, node.result, routing)
    shape = (*sizes, chosen.shape[1])
    return Named(slots.reshape(shape), (*tokens, choice)).to(experts.axes)


def _ranks_in_experts(
    attrs: Attrs,
    groups: int,
    chosen: Array,
    wanted: Array | None,
    priority: Array | None,
) -> Array:
    """Return how many choices of one group and expert come before each, −1 where not `wanted`.

    Args:
      attrs: the attributes of the node.
      groups: the number of token groups.
      chosen: the expert of each choice, ``[tokens, choice]``.
      wanted: which choices ask for a slot, likewise; None if all do.
      priority: tokens take their turns by falling priority, ``[tokens]``; None: in their order.
    """
    experts, by_choice = attrs["experts"], attrs["order"] == "choice"
    group = jnp.arange(chosen.shape[0], dtype=jnp.int32) // max(chosen.shape[0] // groups, 1)
    keys = chosen + group[:, None] * experts
    if wanted is not None:
        # What is left out may name no expert at all, so its key must not be looked up.
        keys = jnp.where(wanted, keys, 0)
    order = None if priority is None else jnp.argsort(-priority, stable=True)

    def in_turn(array: Array) -> Array:
        array = array if order is None else array[order]
        return array.T if by_choice else array

    keys = in_turn(keys)
    asked = None if wanted is None else in_turn(wanted)
    ranks = rank_in_expert(sort_by_expert(keys, groups * experts, asked), keys)
    if asked is not None:
        ranks = jnp.where(asked, ranks, -1)
    ranks = ranks.T if by_choice else ranks
    return ranks if order is None else jnp.zeros_like(ranks).at[order].set(ranks)


@lowering("expert_choice")
def _expert_choice(
    ctx: TraceContext, node: Node, scores: Named, *mask: Named
) -> tuple[Operand, ...]:
    attrs = ctx.view.attrs(node)
    tokens: Names = attrs["tokens"]
    sizes, values = tuple(map(scores.size, tokens)), _flat(scores, tokens)
    groups = group_count(attrs, values.shape[0])
    limit = capacity(attrs, values.shape[0] // max(groups, 1), 1)
    ranked = values
    if mask:
        ranked = jnp.where(_flat(mask[0], tokens)[:, None], values, -jnp.inf)
    experts = jnp.broadcast_to(jnp.arange(attrs["experts"], dtype=jnp.int32), values.shape)
    slots = _taken(lax.stop_gradient(ranked), groups, limit)
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
    best, index = lax.top_k(columns, min(limit, size))
    slot = jnp.where(best > -jnp.inf, jnp.arange(best.shape[-1], dtype=jnp.int32), -1)
    slots = jnp.full(columns.shape, -1, jnp.int32)
    slots = jnp.put_along_axis(slots, index, slot, axis=-1, inplace=False)
    return slots.swapaxes(1, 2).reshape(ranked.shape)


@lowering("group_sum")
def _group_sum(ctx: TraceContext, node: Node, x: Named, slots: Named) -> Operand:
    (attrs,) = (ctx.view.attrs(v.node) for v in node.operands[1:] if v.node is not None)
    flat = _flat(x, attrs["tokens"])
    groups = group_count(attrs, flat.shape[0])
    parts = flat.reshape(groups, flat.shape[0] // max(groups, 1), *flat.shape[1:])
    total = jnp.sum(parts.astype(accumulator(ctx.dtype)), axis=1).astype(x.array.dtype)
    return Named(total, ("group", *(a for a in x.axes if a not in attrs["tokens"])))


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
    return layout.permute_gates(_flat(gates, layout.routing.tokens))


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
    layout = ctx.layouts[node.operands[2]]
    if isinstance(rows, Rows):
        layout = rows.layout
    else:
        axis = node.operands[0].type["expert"]
        parts = ctx.view.shard_count(axis)
        if parts > 1:
            # On a mesh, a device may have the rows of some experts alone.
            count = layout.routing.num_experts // parts
            layout = layout.of_experts(ctx.view.offset(axis, count), count)
    tokens = layout.routing.tokens
    x = layout.unpermute(rows, None if gates is None else _flat(gates, tokens))
    outer = tuple(a for a in node.result.type.names if a in tokens)
    return x.to((*outer, *(a for a in x.axes if a not in tokens)))


# Lowering of bounded receive buffers, where a program sees the tokens of all groups.


@lowering("within_buffer")
def _within_buffer(
    ctx: TraceContext, node: Node, experts: Named, slots: Named, counts: Named
) -> Named:
    attrs, tokens = ctx.view.attrs(node), WithinBufferOp.of_node(node).tokens
    (choice,) = (a for a in experts.axes if a not in tokens)
    chosen, ranks = (_flat(x, tokens) for x in (experts, slots))
    counted = counts.to(("group", "expert")).array.astype(jnp.int32)
    groups, num_experts = counted.shape
    blocks, parts = attrs["blocks"], attrs["parts"]
    # The mesh axes along which the counts are of all tokens, and the tokens of some.
    over = node.operands[0].type[tokens[0]].mesh[len(node.operands[2].type["group"].mesh) :]
    mine = groups // (1 if ctx.view.mesh is None else ctx.view.mesh.size(over))
    each = chosen.shape[0] // mine
    rows = buffer_rows(attrs, each * groups // blocks, chosen.shape[1])
    cells = counted.reshape(blocks, groups // blocks, parts, num_experts // parts)
    line = cells.transpose(0, 2, 1, 3).reshape(blocks, parts, -1)
    room = jnp.clip(rows - starts_of(line, -1), 0, line)
    back = room.reshape(blocks, parts, groups // blocks, num_experts // parts)
    limit = back.transpose(0, 2, 1, 3).reshape(groups, num_experts)
    group = ctx.view.shard_index(over) * mine + jnp.arange(chosen.shape[0]) // max(each, 1)
    there = (ranks >= 0) & (chosen >= 0) & (chosen < num_experts)
    keep = there & (ranks < limit[group[:, None], jnp.where(there, chosen, 0)])
    sizes = (*map(experts.size, tokens), chosen.shape[1])
    return Named(keep.reshape(sizes), (*tokens, choice)).to(experts.axes)
