"""Lowering of random numbers, policies, hashes and expert choice."""

from __future__ import annotations

from math import pi, prod
from typing import Any

import jax
import jax.numpy as jnp

from moecc.ir.graph import Node
from moecc.ir.table.slots import capacity, group_count
from moecc_backends.xla.dispatch.choose import packed
from moecc_backends.xla.dispatch.layout import Routing
from moecc_backends.xla.trace.context import Context, lowering
from moecc_backends.xla.trace.device_view import bits_at
from moecc_backends.xla.trace.dtypes import accumulator
from moecc_backends.xla.trace.values import Named, Operand, Rows, lifted


@lowering("fold_key")
def _fold_key(ctx: Context, node: Node, key: Named) -> Operand:
    return Named(jax.random.fold_in(key.array, node.attrs["by"]), ())


def _uniform(
    ctx: Context, key: jax.Array, node: Node, axes: tuple[str, ...], shape: tuple[int, ...]
) -> jax.Array:
    """Return 23 random bits for each place as numbers on [0, 1)."""
    type = node.result.type
    places = ctx.local.places(type.with_axes(type[a] for a in axes), shape)
    # The part of a device has the numbers that the whole has there.
    bits = jax.random.bits(key, shape, jnp.uint32) if places is None else bits_at(key, places)
    return (bits >> 9).astype(accumulator(ctx.dtype)) / 2**23


def _places(like: Named) -> tuple[tuple[str, ...], tuple[int, ...]]:
    # In alphabetical order, so that the order of the axes means nothing.
    axes = tuple(sorted(like.axes))
    return axes, tuple(like.size(a) for a in axes)


@lowering("random_uniform")
def _random_uniform(ctx: Context, node: Node, key: Named, like: Named) -> Operand:
    axes, shape = _places(like)
    low, high = node.attrs["low"], node.attrs["high"]
    numbers = low + _uniform(ctx, key.array, node, axes, shape) * (high - low)
    return Named(numbers.astype(_kind(like, ctx)), axes).to(like.axes)


@lowering("random_normal")
def _random_normal(ctx: Context, node: Node, key: Named, like: Named) -> Operand:
    axes, shape = _places(like)
    keys = (jax.random.fold_in(key.array, by) for by in (0, 1))
    first, second = (_uniform(ctx, k, node, axes, shape) for k in keys)
    numbers = jnp.sqrt(-2 * jnp.log1p(-first)) * jnp.cos(2 * pi * second) * node.attrs["std"]
    return Named(numbers.astype(_kind(like, ctx)), axes).to(like.axes)


def _kind(like: Named, ctx: Context) -> Any:
    is_float = jnp.issubdtype(like.array.dtype, jnp.floating)
    return like.array.dtype if is_float else accumulator(ctx.dtype)


@lowering("keep_choices")
def _keep_choices(ctx: Context, node: Node, gates: Operand, *uniform: Operand) -> Operand:
    policy, threshold = node.attrs["policy"], node.attrs["threshold"]

    def decide(full: Named) -> Named:
        first = (jnp.arange(full.size(node.attrs["choice"])) == 0).reshape(
            [-1 if a == node.attrs["choice"] else 1 for a in full.axes]
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


@lowering("hash_experts")
def _hash_experts(ctx: Context, node: Node, ids: Operand) -> Operand:
    attrs = node.attrs

    def choose(full: Named) -> Named:
        h = full.array.astype(jnp.uint32) ^ jnp.uint32(attrs["seed"] * 0x9E3779B9 % 2**32)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            h = (h ^ (h >> shift)) * jnp.uint32(factor)
        first = ((h ^ (h >> 16)) % jnp.uint32(attrs["experts"])).astype(jnp.int32)
        chosen = (first[..., None] + jnp.arange(attrs["top_k"], dtype=jnp.int32)) % attrs["experts"]
        return Named(chosen, (*full.axes, attrs["choice"]))

    return lifted(ids, choose)


@lowering("expert_choice")
def _expert_choice(ctx: Context, node: Node, scores: Named, *mask: Named) -> tuple[Operand, ...]:
    attrs = ctx.local.attrs(node)
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
    place = node.results[-1]
    ctx.packings[place] = packed(place, routing, ctx.options, ctx.dtype)
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
def _group_sum(ctx: Context, node: Node, x: Named, place: Named) -> Operand:
    (attrs,) = (ctx.local.attrs(v.node) for v in node.operands[1:] if v.node is not None)
    tokens: tuple[str, ...] = attrs["tokens"]
    rest = tuple(a for a in x.axes if a not in tokens)
    source = x.to((*tokens, *rest)).array
    flat = source.reshape(prod(source.shape[: len(tokens)]), *source.shape[len(tokens) :])
    groups = group_count(attrs, flat.shape[0])
    parts = flat.reshape(groups, flat.shape[0] // max(groups, 1), *flat.shape[1:])
    total = jnp.sum(parts.astype(accumulator(ctx.dtype)), axis=1).astype(x.array.dtype)
    return Named(total, ("group", *rest))
