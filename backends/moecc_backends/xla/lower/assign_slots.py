"""Lowering of slots: who gets one at which expert; there a strategy lays out rows.

It is the same on one device, under `shard_map` and for XLA's partitioner.  What the partitioner
must not mix, the tokens of several groups, the interceptor of the context keeps apart.
"""

from __future__ import annotations

from functools import partial
from math import prod

import jax
import jax.numpy as jnp

from moecc.ir.attributes import SlotAttrs
from moecc.ir.graph import Node, Value
from moecc.ir.ops import Attrs
from moecc.ir.table.slots import capacity, group_count
from moecc_backends.xla.dispatch.choose import plan_dispatch
from moecc_backends.xla.dispatch.expert_exchange import exchanged_once
from moecc_backends.xla.dispatch.permutation import rank_in_expert, sort_by_expert
from moecc_backends.xla.dispatch.rounds import InRounds, RoundSpec
from moecc_backends.xla.dispatch.sorted_rows import SortedRows
from moecc_backends.xla.trace.context import Context, lowering
from moecc_backends.xla.trace.dtypes import accumulator
from moecc_backends.xla.trace.routing import Routing
from moecc_backends.xla.trace.values import Named, Operand


def _plan(ctx: Context, slots: Value, routing: Routing) -> None:
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
def _assign(ctx: Context, node: Node, experts: Named, *given: Named) -> Operand:
    attrs = ctx.view.attrs(node)
    tokens: tuple[str, ...] = attrs["tokens"]
    (choice,) = (a for a in experts.axes if a not in tokens)
    sizes = tuple(experts.size(a) for a in tokens)
    chosen = experts.to((*tokens, choice)).array.reshape(prod(sizes), experts.size(choice))
    groups = group_count(attrs, chosen.shape[0])
    more = dict(zip(attrs["using"], given, strict=True))
    wanted = _wanted_choices(node, chosen, more, (*tokens, choice))
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


def _wanted_choices(
    node: Node, chosen: jax.Array, more: dict[str, Named], layout: tuple[str, ...]
) -> jax.Array | None:
    """Return which choices ask for a slot, ``[token, choice]``, or None if all do."""
    wanted = None
    if not _always_names_experts(node.operands[0]):
        wanted = (chosen >= 0) & (chosen < SlotAttrs.of_node(node).experts)
    if "keep" in more:
        keep = more["keep"].to(layout).array.reshape(chosen.shape)
        wanted = keep if wanted is None else wanted & keep
    if "mask" in more:
        mask = more["mask"].to(layout[:-1]).array.reshape(-1, 1)
        wanted = jnp.broadcast_to(mask, chosen.shape) if wanted is None else wanted & mask
    return wanted


def _always_names_experts(experts: Value) -> bool:
    return experts.node is not None and experts.node.op.name in ("route", "hash_experts")


def _ranks_in_experts(
    attrs: Attrs,
    groups: int,
    chosen: jax.Array,
    wanted: jax.Array | None,
    priority: jax.Array | None,
) -> jax.Array:
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
def _expert_choice(ctx: Context, node: Node, scores: Named, *mask: Named) -> tuple[Operand, ...]:
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


def _taken(ranked: jax.Array, groups: int, limit: int) -> jax.Array:
    """Return the slot of each token at each expert, or −1: ``[token, expert]``."""
    size = ranked.shape[0] // max(groups, 1)
    columns = ranked.reshape(groups, size, -1).swapaxes(1, 2)
    best, index = jax.lax.top_k(columns, min(limit, size))
    slot = jnp.where(best > -jnp.inf, jnp.arange(best.shape[-1], dtype=jnp.int32), -1)
    slots = jnp.full(columns.shape, -1, jnp.int32)
    slots = jnp.put_along_axis(slots, index, slot, axis=-1, inplace=False)
    return slots.swapaxes(1, 2).reshape(ranked.shape)


@lowering("group_sum")
def _group_sum(ctx: Context, node: Node, x: Named, slots: Named) -> Operand:
    (attrs,) = (ctx.view.attrs(v.node) for v in node.operands[1:] if v.node is not None)
    tokens: tuple[str, ...] = attrs["tokens"]
    rest = tuple(a for a in x.axes if a not in tokens)
    source = x.to((*tokens, *rest)).array
    flat = source.reshape(prod(source.shape[: len(tokens)]), *source.shape[len(tokens) :])
    groups = group_count(attrs, flat.shape[0])
    parts = flat.reshape(groups, flat.shape[0] // max(groups, 1), *flat.shape[1:])
    total = jnp.sum(parts.astype(accumulator(ctx.dtype)), axis=1).astype(x.array.dtype)
    return Named(total, ("group", *rest))
