"""Mixtures of gated experts in jax.numpy, as one writes them by hand: one for each dispatch.

Each is a function of the weights of experts, ``{"gate", "up": [expert, embed, mlp], "down":
[expert, mlp, embed]}``, a router ``[expert, embed]`` and tokens ``[..., embed]``.  Gates are the
softmax over the chosen logits.  Gradients are those that JAX derives.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

import jax
import jax.numpy as jnp

TOP_K = 2
CAPACITY_FACTOR = 1.25
BLOCK = 64
"""Rows of a block of `grouped`."""

Params = Any
Block = Callable[[Params, jax.Array, jax.Array], jax.Array]
Rows = Callable[[Params, jax.Array, jax.Array, jax.Array], jax.Array]


def swiglu(p: Params, x: jax.Array) -> jax.Array:
    """One dense block: ``[token, embed]``."""
    return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def routed(rows: Rows) -> Block:
    """Return the mixture that routes tokens and lets `rows` do the rest.

    `rows` is a function of weights, tokens ``[token, embed]``, and gates and experts
    ``[token, choice]``.
    """

    def block(p: Params, router: jax.Array, x: jax.Array) -> jax.Array:
        tokens = x.reshape(-1, x.shape[-1])
        logits, chosen = jax.lax.top_k(tokens @ router.T, TOP_K)
        return rows(p, tokens, jax.nn.softmax(logits), chosen).reshape(x.shape)

    return block


def count(p: Params) -> int:
    """Return the number of experts."""
    experts: int = p["gate"].shape[0]
    return experts


@routed
def scan(p: Params, x: jax.Array, gates: jax.Array, chosen: jax.Array) -> jax.Array:
    """All experts on all tokens, one after the other."""

    def one(total: jax.Array, each: Any) -> tuple[jax.Array, None]:
        expert, number = each
        weight = jnp.sum(jnp.where(chosen == number, gates, 0.0), -1)
        return total + weight[:, None] * swiglu(expert, x), None

    return jax.lax.scan(one, jnp.zeros_like(x), (p, jnp.arange(count(p))))[0]


@routed
def used(p: Params, x: jax.Array, gates: jax.Array, chosen: jax.Array) -> jax.Array:
    """The experts that a token chose, one after the other on all tokens."""
    total = jnp.zeros_like(x)
    for number in range(count(p)):
        own = jax.tree.map(lambda w, n=number: w[n], p)
        weight = jnp.sum(jnp.where(chosen == number, gates, 0.0), -1)
        total = jax.lax.cond(
            jnp.any(chosen == number),
            lambda t, own=own, weight=weight: t + weight[:, None] * swiglu(own, x),
            lambda t: t,
            total,
        )
    return total


def by_expert(chosen: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the order of choices by expert, and the place of each choice in it."""
    order = jnp.argsort(chosen.reshape(-1))
    return order, jnp.argsort(order)


@routed
def ragged_dot(p: Params, x: jax.Array, gates: jax.Array, chosen: jax.Array) -> jax.Array:
    """Rows sorted by expert, and JAX's ragged products."""
    order, place = by_expert(chosen)
    sizes = jnp.bincount(chosen.reshape(-1), length=count(p))
    rows = x[order // TOP_K]
    hidden = jax.nn.silu(jax.lax.ragged_dot(rows, p["gate"], sizes))
    hidden = hidden * jax.lax.ragged_dot(rows, p["up"], sizes)
    made = jax.lax.ragged_dot(hidden, p["down"], sizes)
    return jnp.einsum("tkd,tk->td", made[place].reshape(*chosen.shape, -1), gates)


@routed
def grouped(p: Params, x: jax.Array, gates: jax.Array, chosen: jax.Array) -> jax.Array:
    """Rows sorted by expert, those of each filled up to whole blocks, and a loop over blocks."""
    experts, choices = count(p), chosen.size
    _, place = by_expert(chosen)
    sizes = jnp.bincount(chosen.reshape(-1), length=experts)
    blocks = -(-sizes // BLOCK)
    # What is filled up before the rows of each expert.
    shift = (jnp.cumsum(blocks) - blocks) * BLOCK - (jnp.cumsum(sizes) - sizes)
    row_of_choice = place + shift[chosen.reshape(-1)]
    most = choices // BLOCK + experts
    rows = jnp.zeros((most * BLOCK, x.shape[1]), x.dtype)
    rows = rows.at[row_of_choice].set(jnp.repeat(x, TOP_K, axis=0))
    expert_of_block = jnp.searchsorted(jnp.cumsum(blocks), jnp.arange(most), side="right")
    expert_of_block = jnp.minimum(expert_of_block, experts - 1)

    def one(each: tuple[jax.Array, jax.Array]) -> jax.Array:
        block, number = each
        return swiglu(jax.tree.map(lambda w: w[number], p), block)

    made = jax.lax.map(one, (rows.reshape(most, BLOCK, -1), expert_of_block))
    found = made.reshape(rows.shape)[row_of_choice].reshape(*chosen.shape, -1)
    return jnp.einsum("tkd,tk->td", found, gates)


@routed
def gathered(p: Params, x: jax.Array, gates: jax.Array, chosen: jax.Array) -> jax.Array:
    """Each row with a copy of the weights of its expert."""
    own = jax.tree.map(lambda w: w[chosen.reshape(-1)], p)
    rows = jnp.repeat(x, TOP_K, axis=0)
    hidden = jax.nn.silu(jnp.einsum("rd,rdf->rf", rows, own["gate"]))
    hidden = hidden * jnp.einsum("rd,rdf->rf", rows, own["up"])
    made = jnp.einsum("rf,rfd->rd", hidden, own["down"]).reshape(*chosen.shape, -1)
    return jnp.einsum("tkd,tk->td", made, gates)


def slots_of(chosen: jax.Array, experts: int) -> tuple[jax.Array, int]:
    """Return the slot of each choice at its expert, first choices first, and the slots of one."""
    hot = jax.nn.one_hot(chosen.T.reshape(-1), experts, dtype=jnp.int32)
    before = jnp.cumsum(hot, axis=0) - hot
    slots = jnp.sum(before * hot, -1).reshape(chosen.shape[::-1]).T
    return slots, ceil(CAPACITY_FACTOR * chosen.size / experts)


def in_slots(p: Params, rows: jax.Array) -> jax.Array:
    """Run each expert on its slots: ``[expert, slot, embed]``."""
    hidden = jax.nn.silu(jnp.einsum("esd,edf->esf", rows, p["gate"]))
    hidden = hidden * jnp.einsum("esd,edf->esf", rows, p["up"])
    return jnp.einsum("esf,efd->esd", hidden, p["down"])


@routed
def gather(p: Params, x: jax.Array, gates: jax.Array, chosen: jax.Array) -> jax.Array:
    """Slots under a capacity, reached by index; what has none is dropped."""
    slots, limit = slots_of(chosen, count(p))
    row = jnp.where(slots < limit, chosen * limit + slots, count(p) * limit)
    rows = jnp.zeros((count(p) * limit + 1, x.shape[1]), x.dtype)
    rows = rows.at[row.reshape(-1)].set(jnp.repeat(x, TOP_K, axis=0))
    made = in_slots(p, rows[:-1].reshape(count(p), limit, -1)).reshape(-1, x.shape[1])
    found = jnp.take(made, row.reshape(-1), axis=0, mode="fill", fill_value=0)
    return jnp.einsum("tkd,tk->td", found.reshape(*chosen.shape, -1), gates)


@routed
def einsum(p: Params, x: jax.Array, gates: jax.Array, chosen: jax.Array) -> jax.Array:
    """Slots under a capacity, filled and read by products with one-hot masks (GShard)."""
    slots, limit = slots_of(chosen, count(p))
    experts = jax.nn.one_hot(chosen, count(p), dtype=x.dtype)
    places = jax.nn.one_hot(slots, limit, dtype=x.dtype)
    mask = jnp.einsum("tke,tks->tes", experts, places)
    weighted = jnp.einsum("tke,tks,tk->tes", experts, places, gates)
    made = in_slots(p, jnp.einsum("tes,td->esd", mask, x))
    return jnp.einsum("tes,esd->td", weighted, made)


BY_HAND: dict[str, Block] = {
    "scan": scan, "einsum": einsum, "gather": gather, "grouped": grouped,
    "ragged_dot": ragged_dot, "gathered": gathered, "used": used,
}  # fmt: skip
"""By the names of ``moecc.ir.conventions``."""

CAPACITY = ("einsum", "gather")
"""Those that need a capacity."""

OF_FEW_TOKENS = ("gathered", "used")
"""Those for a step of decoding."""
