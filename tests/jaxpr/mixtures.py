"""Mixtures written by hand: all experts on all tokens, weighed by the router's choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Block = Callable[[Any, jax.Array], jax.Array]
"""A feed-forward block: its parameters and ``[…, embed]`` to ``[…, embed]``."""


def mixture(block: Block, experts, router: jax.Array, x: jax.Array, top_k: int) -> jax.Array:
    """Return a mixture with renormalised softmax gates over `top_k` experts.

    Args:
      block: one expert.
      experts: its parameters, the experts in front.
      router: ``[expert, embed]``.
      x: the tokens, ``[…, embed]``.
      top_k: experts a token.
    """
    logits = x.astype(jnp.float32) @ router.astype(jnp.float32).T
    chosen, which = jax.lax.top_k(logits, top_k)
    gates = jax.nn.softmax(chosen, -1)
    weights = jnp.sum(jax.nn.one_hot(which, router.shape[0]) * gates[..., None], -2)
    every = jax.vmap(block, (0, None))(experts, x)
    return jnp.einsum("e...d,...e->...d", every.astype(jnp.float32), weights).astype(every.dtype)


def drawn(params, seed: int = 0):
    """Return parameters of the same shapes, all drawn at random: no two experts are alike."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        width = leaf.shape[-1] if leaf.ndim else 1
        return jnp.asarray(rng.normal(0, width**-0.5, leaf.shape), leaf.dtype)

    return jax.tree.map(draw, params)


def apart(a, b) -> float:
    """Return the largest difference of two trees, relative to their magnitude."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(_apart(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in pairs)


def _apart(x, y) -> float:
    return float(np.max(np.abs(x - y)) / max(np.max(np.abs(y)), 1e-9))
