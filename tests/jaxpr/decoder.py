"""A decoder in plain jnp, whose feed-forward block is an argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, EMBED, MLP = 37, 16, 24

Params = Any
Ffn = Callable[[Any, jax.Array], jax.Array]


def _drawing(seed: int) -> Callable[..., jax.Array]:
    rng = np.random.default_rng(seed)
    return lambda *shape: jnp.asarray(rng.normal(0, shape[0] ** -0.5, shape), jnp.float32)


def init(layers: int = 2, seed: int = 0) -> Params:
    """Return parameters."""
    draw = _drawing(seed)
    return {
        "embed": draw(VOCAB, EMBED),
        "head": draw(EMBED, VOCAB),
        "layers": [
            {
                "norm1": jnp.ones(EMBED),
                "norm2": jnp.ones(EMBED),
                "attention": {n: draw(EMBED, EMBED) for n in "qkvo"},
                "mlp": {"gate": draw(EMBED, MLP), "up": draw(EMBED, MLP), "down": draw(MLP, EMBED)},
            }
            for _ in range(layers)
        ],
    }


def swiglu(p, x: jax.Array) -> jax.Array:
    """A gated block."""
    return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    """RMS norm."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * gain


def attention(p, x: jax.Array) -> jax.Array:
    """Causal attention with one head."""
    q, k, v = (x @ p[n] for n in "qkv")
    scores = q @ jnp.swapaxes(k, -1, -2) * EMBED**-0.5
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    return jax.nn.softmax(jnp.where(causal, scores, -1e9), -1) @ v @ p["o"]


def layer(p, x: jax.Array, ffn: Ffn) -> jax.Array:
    """One layer."""
    x = x + attention(p["attention"], norm(x, p["norm1"]))
    return x + ffn(p["mlp"], norm(x, p["norm2"]))


def model(params: Params, tokens: jax.Array, ffn: Ffn = swiglu) -> jax.Array:
    """Return logits ``[batch, seq, vocab]``."""
    x = params["embed"][tokens]
    for p in params["layers"]:
        x = layer(p, x, ffn)
    return x @ params["head"]


def loss(params: Params, tokens: jax.Array, ffn: Ffn = swiglu) -> jax.Array:
    """Return the mean cross entropy of the next tokens."""
    logits = jax.nn.log_softmax(model(params, tokens[:, :-1], ffn))
    return -jnp.mean(jnp.take_along_axis(logits, tokens[:, 1:, None], -1))


def tokens(batch: int = 2, seq: int = 7, seed: int = 1) -> jax.Array:
    """Return random tokens."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, (batch, seq)), jnp.int32)
