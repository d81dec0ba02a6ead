"""Lowering of the choice of experts: by scores, by a hash, and policies that keep choices."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moecc.ir.attributes import HashExpertsAttrs, KeepChoicesAttrs, RouteAttrs
from moecc.ir.gates import convention
from moecc.ir.graph import Node
from moecc_backends.xla.lower.reductions import softmax
from moecc_backends.xla.trace.arrays import lifted, lifted_all
from moecc_backends.xla.trace.context import Context, lowering
from moecc_backends.xla.trace.dtypes import accumulator
from moecc_backends.xla.trace.values import Named, Operand, Rows


@lowering("route")
def _route(ctx: Context, node: Node, logits: Operand, *bias: Named) -> tuple[Operand, ...]:
    attrs = RouteAttrs.of_node(node)

    def choose(full: Named) -> tuple[Named, Named]:
        rest = tuple(a for a in full.axes if a != attrs.axis)
        scores = full.to((*rest, attrs.axis)).array
        if attrs.precision == "f32":
            scores = scores.astype(accumulator(scores.dtype))
        if bias:
            ranked = _scores(attrs.gates, scores) + bias[0].array.astype(scores.dtype)
            _, experts = jax.lax.top_k(jax.lax.stop_gradient(ranked), attrs.top_k)
            best = jnp.take_along_axis(scores, experts, axis=-1)
        else:
            best, experts = jax.lax.top_k(scores, attrs.top_k)
        gates = GATES[attrs.gates](scores, best, experts) * attrs.scale
        axes = (*rest, attrs.choice)
        return Named(experts.astype(jnp.int32), axes), Named(gates, axes)

    return lifted_all(logits, choose)


def _scores(kind: str, logits: jax.Array) -> jax.Array:
    """Return what a bias for choosing is added to."""
    is_sigmoid = convention(kind).score == "sigmoid"
    return jax.nn.sigmoid(logits) if is_sigmoid else jax.nn.softmax(logits, axis=-1)


def _renormalised(scores: jax.Array, best: jax.Array, experts: jax.Array) -> jax.Array:
    return softmax(best, -1)


def _softmax(scores: jax.Array, best: jax.Array, experts: jax.Array) -> jax.Array:
    return jnp.take_along_axis(softmax(scores, -1), experts, -1)


def _sigmoid(scores: jax.Array, best: jax.Array, experts: jax.Array) -> jax.Array:
    return jax.nn.sigmoid(best)


def _sigmoid_renormalised(scores: jax.Array, best: jax.Array, experts: jax.Array) -> jax.Array:
    chosen = jax.nn.sigmoid(best)
    return chosen / chosen.sum(-1, keepdims=True)


def _ones(scores: jax.Array, best: jax.Array, experts: jax.Array) -> jax.Array:
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


GATES: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "renormalised": _renormalised,
    "softmax": _softmax,
    "sigmoid": _sigmoid,
    "sigmoid-renormalised": _sigmoid_renormalised,
    "sparsemixer": _sparsemixer,
    "ones": _ones,
}
"""By convention, see ``route`` in the operation table: gates of scores, of the scores that were
chosen, and of the experts that were."""


@lowering("keep_choices")
def _keep_choices(ctx: Context, node: Node, gates: Operand, *uniform: Operand) -> Operand:
    attrs = KeepChoicesAttrs.of_node(node)
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


def _hashed(ids: jax.Array, seed: int) -> jax.Array:
    h = ids ^ jnp.uint32(seed * 0x9E3779B9 % 2**32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * jnp.uint32(factor)
    found: jax.Array = h ^ (h >> 16)
    return found


@lowering("hash_experts")
def _hash_experts(ctx: Context, node: Node, ids: Operand) -> Operand:
    attrs = HashExpertsAttrs.of_node(node)

    def choose(full: Named) -> Named:
        ids = full.array.astype(jnp.uint32)
        number = ids if attrs.hash == "modulo" else _hashed(ids, attrs.seed)
        first = (number % jnp.uint32(attrs.experts)).astype(jnp.int32)
        chosen = (first[..., None] + jnp.arange(attrs.top_k, dtype=jnp.int32)) % attrs.experts
        return Named(chosen, (*full.axes, attrs.choice))

    return lifted(ids, choose)
