"""Lowering of routing: sorted rows where nothing drops, slots otherwise."""

from __future__ import annotations

from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from moecc.errors import InputError
from moecc.ir.graph import Node
from moecc.ir.table.routing import capacity
from moecc_backends.xla.context import Context, lowering
from moecc_backends.xla.dispatch import combine, dispatch
from moecc_backends.xla.dtypes import accumulator
from moecc_backends.xla.lower_plain import softmax
from moecc_backends.xla.named import SLOT_AXES, Named, Operand, Rows, lifted_all
from moecc_backends.xla.packing import Packing, packed
from moecc_backends.xla.routing import capacity_placement, rank_in_expert, sort_by_expert


@lowering("route")
def _route(ctx: Context, node: Node, logits: Operand) -> tuple[Operand, ...]:
    attrs = node.attrs

    def choose(full: Named) -> tuple[Named, Named]:
        rest = tuple(a for a in full.axes if a != attrs["axis"])
        scores = full.to((*rest, attrs["axis"])).array
        scores = scores.astype(accumulator(scores.dtype))
        best, experts = jax.lax.top_k(scores, attrs["top_k"])
        gates = _gates(attrs["gates"], scores, best, experts) * attrs["scale"]
        axes = (*rest, attrs["choice"])
        return Named(experts.astype(jnp.int32), axes), Named(gates, axes)

    return lifted_all(logits, choose)


def _gates(kind: str, scores: jax.Array, best: jax.Array, experts: jax.Array) -> jax.Array:
    """Return the gates of the chosen experts; see ``route`` in the operation table."""
    if kind == "renormalised":
        return softmax(best, -1)
    if kind == "softmax":
        return jnp.take_along_axis(softmax(scores, -1), experts, -1)
    if kind == "sigmoid-renormalised":
        chosen = jax.nn.sigmoid(best)
        return chosen / chosen.sum(-1, keepdims=True)
    if kind == "sigmoid":
        return jax.nn.sigmoid(best)
    if kind == "sparsemixer":
        return _sparsemixer(scores, best, experts)
    return jnp.ones_like(best)


def _sparsemixer(scores: jax.Array, best: jax.Array, experts: jax.Array) -> jax.Array:
    """Each choice's softmax among the logits near it; earlier choices no longer take part."""
    left, gates = scores, []
    for k in range(experts.shape[-1]):
        top = best[..., k : k + 1]
        distance = (top - scores) / jnp.maximum(jnp.abs(scores), top)
        near = jnp.where(distance > 0.02, -jnp.inf, left)
        gates.append(jnp.take_along_axis(softmax(near, -1), experts[..., k : k + 1], -1))
        taken = jax.nn.one_hot(experts[..., k], scores.shape[-1], dtype=bool)
        left = jnp.where(taken, -jnp.inf, left)
    return jnp.concatenate(gates, axis=-1)


@lowering("place")
def _place(ctx: Context, node: Node, experts: Named) -> Operand:
    attrs = node.attrs
    tokens: tuple[str, ...] = attrs["tokens"]
    (choice,) = (a for a in experts.axes if a not in tokens)
    sizes = tuple(experts.size(a) for a in tokens)
    chosen = experts.to((*tokens, choice)).array.reshape(prod(sizes), -1)
    groups = attrs["groups"]
    if chosen.shape[0] % groups:
        raise InputError(
            "the groups do not divide the tokens",
            where=node.loc,
            expected=f"a multiple of {groups} tokens",
            found=str(chosen.shape[0]),
        )
    # A choice that names no expert is not placed.
    named = (chosen >= 0) & (chosen < attrs["experts"])
    ranks = _ranks(chosen, named, attrs)
    if attrs["slots"] == "ragged":
        # Without a bound groups do not matter: rows are packed by expert alone.
        packing = packed(sort_by_expert(chosen, attrs["experts"], named), tokens, sizes)
        slots = jnp.where(named, ranks, -1)
    else:
        limit = capacity(attrs, chosen.shape[0] // groups, chosen.shape[1])
        slots = jnp.where(named & (ranks < limit), ranks, -1)
        # The experts come first, as a batched product takes them.
        placement = capacity_placement(
            chosen, slots, attrs["experts"], limit, groups, expert_major=True
        )
        packing = Packing(placement, tokens, sizes, shape=(attrs["experts"], groups, limit))
    ctx.packings[node.result] = packing
    return Named(slots.reshape(*sizes, -1), (*tokens, choice)).to(experts.axes)


def _ranks(chosen: jax.Array, named: jax.Array, attrs: dict[str, Any]) -> jax.Array:
    """Return how many choices of the same group and expert are placed before each choice."""
    groups, experts = attrs["groups"], attrs["experts"]
    group = jnp.arange(chosen.shape[0], dtype=jnp.int32) // max(chosen.shape[0] // groups, 1)
    keys = jnp.where(named, chosen, 0) + group[:, None] * experts
    if attrs["order"] == "token":
        return rank_in_expert(sort_by_expert(keys, groups * experts, named), keys)
    keys, named = keys.T, named.T
    return rank_in_expert(sort_by_expert(keys, groups * experts, named), keys).T


@lowering("dispatch")
def _dispatch(ctx: Context, node: Node, x: Named, experts: Named, place: Named) -> Operand:
    packing = ctx.packings[node.operands[2]]
    rest = tuple(a for a in x.axes if a not in packing.tokens)
    source = x.to((*packing.tokens, *rest)).array
    shape = source.shape[len(packing.tokens) :]
    rows = dispatch(source.reshape(prod(packing.token_sizes), -1), packing.placement)
    if packing.shape is None:
        return Rows(rows.reshape(-1, *shape), rest, packing)
    return Named(rows.reshape(*packing.shape, *shape), (*SLOT_AXES, *rest))


@lowering("combine")
def _combine(
    ctx: Context, node: Node, rows: Operand, experts: Named, place: Named, gates: Named
) -> Operand:
    packing = ctx.packings[node.operands[2]]
    if isinstance(rows, Rows):
        rest, array = rows.axes, rows.array
    else:
        rest = tuple(a for a in rows.axes if a not in SLOT_AXES)
        array = rows.to((*SLOT_AXES, *rest)).array
        array = array.reshape(-1, *array.shape[3:])
    shape = array.shape[1:]
    (choice,) = (a for a in gates.axes if a not in packing.tokens)
    weights = gates.to((*packing.tokens, choice)).array.reshape(prod(packing.token_sizes), -1)
    result = combine(array.reshape(array.shape[0], -1), packing.placement, weights)
    outer = tuple(a for a in node.result.type.names if a in packing.tokens)
    whole = Named(result.reshape(*packing.token_sizes, *shape), (*packing.tokens, *rest))
    return whole.to((*outer, *rest))
