"""Lowering of routing, and of the way to the experts and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod

import jax
import jax.numpy as jnp

from moecc.ir.gates import convention
from moecc.ir.graph import Node, Value
from moecc.ir.ops import Attrs
from moecc.ir.table.slots import capacity, group_count
from moecc_backends.xla.dispatch.all_experts import Dense, Lower, OneExpert, sum_over_experts
from moecc_backends.xla.dispatch.capacity_slots import GatheredSlots
from moecc_backends.xla.dispatch.choose import packed
from moecc_backends.xla.dispatch.layout import Packing, Routing, RowPacking, SlotPacking
from moecc_backends.xla.dispatch.permutation import rank_in_expert, sort_by_expert
from moecc_backends.xla.lower.elementwise import softmax
from moecc_backends.xla.trace.context import Context, lower_nodes, lowering
from moecc_backends.xla.trace.dtypes import accumulator
from moecc_backends.xla.trace.padding_rows import poisoned_values, with_poisoned_gradient
from moecc_backends.xla.trace.values import SLOT_AXES, Named, Operand, Rows, lifted_all


@lowering("route")
def _route(ctx: Context, node: Node, logits: Operand, *bias: Named) -> tuple[Operand, ...]:
    attrs = node.attrs

    def choose(full: Named) -> tuple[Named, Named]:
        rest = tuple(a for a in full.axes if a != attrs["axis"])
        scores = full.to((*rest, attrs["axis"])).array
        scores = scores.astype(accumulator(scores.dtype))
        if bias:
            ranked = _scores(attrs["gates"], scores) + bias[0].array.astype(scores.dtype)
            _, experts = jax.lax.top_k(jax.lax.stop_gradient(ranked), attrs["top_k"])
            best = jnp.take_along_axis(scores, experts, axis=-1)
        else:
            best, experts = jax.lax.top_k(scores, attrs["top_k"])
        gates = _gates(attrs["gates"], scores, best, experts) * attrs["scale"]
        axes = (*rest, attrs["choice"])
        return Named(experts.astype(jnp.int32), axes), Named(gates, axes)

    return lifted_all(logits, choose)


def _scores(kind: str, logits: jax.Array) -> jax.Array:
    """Return what a bias for choosing is added to."""
    is_sigmoid = convention(kind).score == "sigmoid"
    return jax.nn.sigmoid(logits) if is_sigmoid else jax.nn.softmax(logits, axis=-1)


def _gates(kind: str, scores: jax.Array, best: jax.Array, experts: jax.Array) -> jax.Array:
    """Return the gates of the chosen experts; see ``route`` in the operation table."""
    return GATES[kind](scores, best, experts)


def _sigmoid_renormalised(scores: jax.Array, best: jax.Array, experts: jax.Array) -> jax.Array:
    chosen = jax.nn.sigmoid(best)
    return chosen / chosen.sum(-1, keepdims=True)


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


GATES: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "renormalised": lambda scores, best, experts: softmax(best, -1),
    "softmax": lambda scores, best, experts: jnp.take_along_axis(softmax(scores, -1), experts, -1),
    "sigmoid-renormalised": _sigmoid_renormalised,
    "sigmoid": lambda scores, best, experts: jax.nn.sigmoid(best),
    "sparsemixer": _sparsemixer,
    "ones": lambda scores, best, experts: jnp.ones_like(best),
}
"""By convention: from logits ``[…, expert]``, those of the choices and their experts
``[…, choice]`` to gates ``[…, choice]``."""


@lowering("assign_slots")
def _place(ctx: Context, node: Node, experts: Named, *given: Named) -> Operand:
    attrs = ctx.local.attrs(node)
    tokens: tuple[str, ...] = attrs["tokens"]
    (choice,) = (a for a in experts.axes if a not in tokens)
    sizes = tuple(experts.size(a) for a in tokens)
    chosen = experts.to((*tokens, choice)).array.reshape(prod(sizes), -1)
    groups = group_count(attrs, chosen.shape[0])
    more = dict(zip(attrs["using"], given, strict=True))
    placed = wanted_choices(node, chosen, more, (*tokens, choice))
    order = _turns(more, tokens)
    slots = ranks_in_experts(chosen, groups, attrs, placed, order)
    limit = None
    if attrs["slots"] == "capacity":
        limit = capacity(attrs, chosen.shape[0] // max(groups, 1), chosen.shape[1])
        slots = jnp.where(slots < limit, slots, -1)
    routing = Routing(chosen, slots, placed, attrs["experts"], groups, limit, tokens, sizes)
    ctx.packings[node.result] = packed(node.result, routing, ctx.options, ctx.dtype)
    return Named(slots.reshape(*sizes, -1), (*tokens, choice)).to(experts.axes)


def wanted_choices(
    node: Node, chosen: jax.Array, more: dict[str, Named], layout: tuple[str, ...]
) -> jax.Array | None:
    """Return which choices ask for a slot, ``[token, choice]``, or None if all do."""
    wanted = None
    if not _always_names_experts(node.operands[0]):
        wanted = (chosen >= 0) & (chosen < node.attrs["experts"])
    if "keep" in more:
        keep = more["keep"].to(layout).array.reshape(chosen.shape)
        wanted = keep if wanted is None else wanted & keep
    if "mask" in more:
        mask = more["mask"].to(layout[:-1]).array.reshape(-1, 1)
        wanted = jnp.broadcast_to(mask, chosen.shape) if wanted is None else wanted & mask
    return wanted


def _always_names_experts(experts: Value) -> bool:
    return experts.node is not None and experts.node.op.name in ("route", "hash_experts")


def _turns(more: dict[str, Named], tokens: tuple[str, ...]) -> jax.Array | None:
    """Return the tokens in the order in which they take their turns, or None if it is theirs."""
    if "priority" not in more:
        return None
    priority = more["priority"].to(tokens).array.reshape(-1)
    return jnp.argsort(-priority, stable=True)


def ranks_in_experts(
    chosen: jax.Array,
    groups: int,
    attrs: Attrs,
    placed: jax.Array | None,
    order: jax.Array | None,
) -> jax.Array:
    """Return how many choices of the same group and expert are placed before each choice.

    The answer is −1 for choices that `placed` leaves out.
    """
    experts = attrs["experts"]
    assert isinstance(experts, int)
    group = jnp.arange(chosen.shape[0], dtype=jnp.int32) // max(chosen.shape[0] // groups, 1)
    keys = chosen + group[:, None] * experts
    if placed is not None:
        # What is left out may name no expert at all, so its key must not be looked up.
        keys = jnp.where(placed, keys, 0)
    if order is not None:
        keys, placed = keys[order], None if placed is None else placed[order]
    if attrs["order"] == "choice":
        keys, placed = keys.T, None if placed is None else placed.T
    ranks = rank_in_expert(sort_by_expert(keys, groups * experts, placed), keys)
    if placed is not None:
        ranks = jnp.where(placed, ranks, -1)
    ranks = ranks.T if attrs["order"] == "choice" else ranks
    return ranks if order is None else jnp.zeros_like(ranks).at[order].set(ranks)


@lowering("dispatch")
def _dispatch(ctx: Context, node: Node, x: Named, experts: Named, place: Named) -> Operand:
    packing = ctx.packings[node.operands[2]]
    assert isinstance(packing, Packing), "dense rows are put off"
    tokens = packing.routing.tokens
    rest = tuple(a for a in x.axes if a not in tokens)
    source = x.to((*tokens, *rest)).array
    shape = source.shape[len(tokens) :]
    rows = packing.dispatch(source.reshape(packing.routing.num_tokens, prod(shape)))
    if isinstance(packing, RowPacking):
        return Rows(rows.reshape(-1, *shape), rest, packing)
    assert isinstance(packing, SlotPacking), "rows lie in slots or by themselves"
    if ctx.options.poison:
        rows = with_poisoned_gradient(rows, packing.is_used)
    return Named(rows.reshape(*packing.shape, *shape), (*SLOT_AXES, *rest))


@lowering("combine")
def _combine(
    ctx: Context, node: Node, rows: Operand | None, experts: Named, place: Named, gates: Named
) -> Operand:
    packing = ctx.packings[node.operands[2]]
    # Under a mesh a device may have the rows of some experts alone.
    packing = rows.packing if isinstance(rows, Rows) else _at_hand(ctx, node.operands[0], packing)
    routing = packing.routing
    (choice,) = (a for a in gates.axes if a not in routing.tokens)
    weights = gates.to((*routing.tokens, choice)).array.reshape(routing.num_tokens, -1)
    if isinstance(packing, Dense):
        made = sum_over_experts(
            packing, node.operands[0], ctx.values, weights, _of_expert(ctx, node)
        )
    else:
        assert rows is not None, "rows are made"
        made = _gathered(ctx, packing, rows, weights)
    outer = tuple(a for a in node.result.type.names if a in routing.tokens)
    rest = made.axes[1:]
    whole = made.array.reshape(*routing.token_sizes, *made.array.shape[1:])
    return Named(whole, (*routing.tokens, *rest)).to((*outer, *rest))


def _at_hand(ctx: Context, rows: Value, packing: Packing | Dense) -> Packing | Dense:
    """Return the packing of `rows`: under a mesh, of the experts whose rows the device has."""
    parts = ctx.local.parts(rows.type["expert"])
    if parts == 1:
        return packing
    assert isinstance(packing, GatheredSlots), "rows that go to other devices lie in slots"
    own = packing.routing.num_experts // parts
    first = ctx.local.offset(rows.type["expert"], own)
    return GatheredSlots(packing.routing.of_experts(first, own))


def _gathered(ctx: Context, packing: Packing, rows: Operand, gates: jax.Array) -> Named:
    """Return the rows of each token, summed: ``[tokens, *axes]``."""
    if isinstance(rows, Rows):
        rest, array = rows.axes, rows.array
    else:
        rest = tuple(a for a in rows.axes if a not in SLOT_AXES)
        array = rows.to((*SLOT_AXES, *rest)).array
        array = array.reshape(prod(array.shape[:3]), *array.shape[3:])
        if ctx.options.poison:
            array = poisoned_values(array, packing.is_used)
    shape = array.shape[1:]
    if not packing.routing.num_tokens:
        # From no rows at all nothing can be gathered.
        return Named(jnp.zeros((0, *shape), array.dtype), ("rows", *rest))
    result = packing.combine(array.reshape(array.shape[0], prod(shape)), gates)
    return Named(result.reshape(-1, *shape), ("rows", *rest))


def _of_expert(ctx: Context, combine: Node) -> Lower:
    """Return what lowers the operations before `combine` with the rows of one expert."""

    def lower(nodes: list[Node], values: dict[Value, Operand], packing: OneExpert) -> None:
        packings: dict[Value, Packing | Dense] = {combine.operands[2]: packing}
        lower_nodes(replace(ctx, values=values, packings=packings, siblings={}, put_off={}), nodes)

    return lower
