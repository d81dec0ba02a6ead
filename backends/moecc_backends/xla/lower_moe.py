"""Lowering of contractions and of routing: sorted rows where nothing drops, slots otherwise."""

from __future__ import annotations

import string
from math import prod

import jax
import jax.numpy as jnp

from moecc.errors import InputError
from moecc.ir.graph import Node, Value
from moecc.ir.table.placing import capacity, group_count
from moecc_backends.reference.attention import frequencies
from moecc_backends.xla.context import Context, lowering
from moecc_backends.xla.dispatch import combine, dispatch
from moecc_backends.xla.dtypes import accumulator
from moecc_backends.xla.grouped import grouped_matmul
from moecc_backends.xla.named import Named, Operand, Rows
from moecc_backends.xla.packing import Packing, packed
from moecc_backends.xla.routing import capacity_placement, rank_in_expert, sort_by_expert


@lowering("rope")
def _rope(ctx: Context, node: Node, positions: Named) -> tuple[Operand, ...]:
    attrs = node.attrs
    length = max(positions.array.shape, default=1)
    wide = accumulator(ctx.dtype)
    rates = jnp.asarray(frequencies(attrs["size"], length, attrs), wide)
    half = positions.array.astype(wide)[..., None] * rates
    angles = jnp.concatenate([half, half], axis=-1)
    axes = (*positions.axes, attrs["axis"])
    factor = attrs["attention_factor"]
    return Named(jnp.cos(angles) * factor, axes), Named(jnp.sin(angles) * factor, axes)


@lowering("contract")
def _contract(ctx: Context, node: Node, x: Operand, w: Operand) -> Operand:
    over: tuple[str, ...] = node.attrs["over"]
    if isinstance(x, Named) and isinstance(w, Named):
        if _feeds_route(node):
            # Selective precision: the router computes in float32 (ST-MoE §3.3).
            wide = accumulator(ctx.dtype)
            x, w = (Named(v.array.astype(wide), v.axes) for v in (x, w))
        return einsum(x, w, over)
    if isinstance(x, Rows) and isinstance(w, Named):
        return _rows_times_weights(ctx, node, x, w)
    raise InputError("the xla backend contracts packed rows with weights only", where=node.loc)


def _feeds_route(node: Node) -> bool:
    """Whether experts are chosen by what `node` gives, or by that plus noise or split in parts."""
    users = list(node.result.users)
    for _ in range(_STEPS_TO_ROUTE):
        if any(user.op.name in ("route", "expert_choice") for user in users):
            return True
        between = [user for user in users if user.op.name in _BEFORE_ROUTE]
        users = [later for user in between for later in user.result.users]
    return False


_BEFORE_ROUTE = ("add", "scale", "softmax", "split", "mask")
"""What may stand between a router's product and the choice."""

_STEPS_TO_ROUTE = 3
"""How far the choice may be: a residual stream is a chain of sums without end."""


def einsum(x: Named, w: Named, over: tuple[str, ...]) -> Named:
    """Sum the product of two arrays over the axes `over`; others that both have are batch axes."""
    result = (
        *(a for a in x.axes if a not in over),
        *(a for a in w.axes if a not in over and a not in x.axes),
    )
    letters = dict(zip(dict.fromkeys((*x.axes, *w.axes)), string.ascii_letters, strict=False))
    spell = ["".join(letters[a] for a in axes) for axes in (x.axes, w.axes, result)]
    array = jnp.einsum(
        f"{spell[0]},{spell[1]}->{spell[2]}",
        x.array,
        w.array,
        preferred_element_type=accumulator(x.array.dtype),
    )
    return Named(array.astype(x.array.dtype), result)


def _rows_times_weights(ctx: Context, node: Node, x: Rows, w: Named) -> Rows:
    """Multiply packed rows with the weights of their experts, or with weights that all share."""
    over: tuple[str, ...] = node.attrs["over"]
    if "expert" not in w.axes:
        product = einsum(x.inner(), w, over)
        inner = tuple(a for a in product.axes if a != "rows")
        return x.with_array(product.to(("rows", *inner)).array, inner)
    made = ctx.siblings.get(node)
    if made is None:
        made = _grouped(ctx, [node, *_siblings(node)], x, w)
    return made


def _siblings(node: Node) -> list[Node]:
    """Return the other contractions of the same rows with parameters alike, such as gate and up.

    They share one walk over the rows.
    """
    rows, weight = node.operands
    return [
        other
        for other in rows.users
        if other is not node
        and other.op.name == "contract"
        and other.operands[0] is rows
        and other.operands[1].is_param
        and other.attrs == node.attrs
        and other.operands[1].type.names == weight.type.names
    ]


def _grouped(ctx: Context, nodes: list[Node], x: Rows, w: Named) -> Rows:
    over: tuple[str, ...] = nodes[0].attrs["over"]
    rest = tuple(a for a in w.axes if a not in over and a != "expert")
    kept = tuple(a for a in x.axes if a not in over)
    if kept:
        raise InputError(
            "the xla backend contracts packed rows over all their inner axes",
            where=nodes[0].loc,
            found=f"the axes {', '.join(kept)} are left",
        )
    rows = x.inner().to(("rows", *over)).array
    rows = rows.reshape(rows.shape[0], -1)
    # Whichever of the two stands last in the checkpoint stays last: nothing is transposed.
    inner_last = w.axes[-1] in over
    order = ("expert", *rest, *over) if inner_last else ("expert", *over, *rest)
    given = [w if n is nodes[0] else ctx.values[n.operands[1]] for n in nodes]
    arrays, sizes = [], tuple(w.size(a) for a in rest)
    for weight in given:
        assert isinstance(weight, Named)
        array = weight.to(order).array
        shape = (prod(sizes), rows.shape[1]) if inner_last else (rows.shape[1], prod(sizes))
        arrays.append(array.reshape(array.shape[0], *shape))
    assert x.packing.group_sizes is not None
    products = grouped_matmul(
        rows, tuple(arrays), x.packing.group_sizes, contracting_axis=2 if inner_last else 1
    )
    for other, product in zip(nodes, products, strict=True):
        ctx.siblings[other] = x.with_array(product.reshape(product.shape[0], *sizes), rest)
    return ctx.siblings[nodes[0]]


@lowering("route")
def _route(ctx: Context, node: Node, logits: Named, *bias: Named) -> tuple[Operand, ...]:
    attrs = node.attrs
    rest = tuple(a for a in logits.axes if a != attrs["axis"])
    scores = logits.to((*rest, attrs["axis"])).array
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


def _scores(kind: str, logits: jax.Array) -> jax.Array:
    """Return what a bias for choosing is added to."""
    return jax.nn.sigmoid(logits) if kind.startswith("sigmoid") else jax.nn.softmax(logits, axis=-1)


def _gates(kind: str, scores: jax.Array, best: jax.Array, experts: jax.Array) -> jax.Array:
    """Return the gates of the chosen experts; see ``route`` in the operation table."""
    if kind == "renormalised":
        return jax.nn.softmax(best, axis=-1)
    if kind == "softmax":
        return jnp.exp(best - jax.nn.logsumexp(scores, axis=-1, keepdims=True))
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
        gates.append(jnp.exp(top - jax.nn.logsumexp(near, axis=-1, keepdims=True)))
        taken = jax.nn.one_hot(experts[..., k], scores.shape[-1], dtype=bool)
        left = jnp.where(taken, -jnp.inf, left)
    return jnp.concatenate(gates, axis=-1)


@lowering("place")
def _place(ctx: Context, node: Node, experts: Named, *given: Named) -> Operand:
    attrs = node.attrs
    tokens: tuple[str, ...] = attrs["tokens"]
    (choice,) = (a for a in experts.axes if a not in tokens)
    sizes = tuple(experts.size(a) for a in tokens)
    chosen = experts.to((*tokens, choice)).array.reshape(prod(sizes), -1)
    groups = group_count(attrs, chosen.shape[0])
    more = dict(zip(attrs["using"], given, strict=True))
    placed = _wanted(node, chosen, more, (*tokens, choice))
    order = _turns(more, tokens)
    slots = _ranks(chosen, groups, attrs, placed, order)
    if attrs["slots"] == "ragged":
        # Without a bound groups do not matter: rows are packed by expert alone.
        packing = packed(sort_by_expert(chosen, attrs["experts"], placed), tokens, sizes)
    else:
        limit = capacity(attrs, chosen.shape[0] // max(groups, 1), chosen.shape[1])
        slots = jnp.where(slots < limit, slots, -1)
        placement = capacity_placement(chosen, slots, attrs["experts"], limit, groups)
        packing = Packing(placement, tokens, sizes, shape=(groups, attrs["experts"], limit))
    ctx.packings[node.result] = packing
    return Named(slots.reshape(*sizes, -1), (*tokens, choice)).to(experts.axes)


def _wanted(
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


def _ranks(
    chosen: jax.Array,
    groups: int,
    attrs: dict[str, object],
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


def _packing(ctx: Context, place: Value) -> Packing:
    return ctx.packings[place]


@lowering("dispatch")
def _dispatch(ctx: Context, node: Node, x: Named, experts: Named, place: Named) -> Operand:
    packing = _packing(ctx, node.operands[2])
    rest = tuple(a for a in x.axes if a not in packing.tokens)
    source = x.to((*packing.tokens, *rest)).array
    shape = source.shape[len(packing.tokens) :]
    rows = dispatch(source.reshape(prod(packing.token_sizes), prod(shape)), packing.placement)
    if packing.shape is None:
        return Rows(rows.reshape(-1, *shape), rest, packing)
    return Named(rows.reshape(*packing.shape, *shape), ("group", "expert", "slot", *rest))


@lowering("combine")
def _combine(
    ctx: Context, node: Node, rows: Operand, experts: Named, place: Named, gates: Named
) -> Operand:
    packing = _packing(ctx, node.operands[2])
    if isinstance(rows, Rows):
        rest, array = rows.axes, rows.array
    else:
        rest = tuple(a for a in rows.axes if a not in ("group", "expert", "slot"))
        array = rows.to(("group", "expert", "slot", *rest)).array
        array = array.reshape(prod(array.shape[:3]), *array.shape[3:])
    shape = array.shape[1:]
    if not array.shape[0]:
        # A capacity of 0: from no rows at all nothing can be gathered.
        array = jnp.zeros((1, *shape), array.dtype)
    (choice,) = (a for a in gates.axes if a not in packing.tokens)
    weights = gates.to((*packing.tokens, choice)).array.reshape(prod(packing.token_sizes), -1)
    result = combine(array.reshape(array.shape[0], prod(shape)), packing.placement, weights)
    outer = tuple(a for a in node.result.type.names if a in packing.tokens)
    whole = Named(result.reshape(*packing.token_sizes, *shape), (*packing.tokens, *rest))
    return whole.to((*outer, *rest))
