"""Lowering of attention as one operation: laid out for a kernel, or product by product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod

import jax
import jax.numpy as jnp

from moecc.errors import InputError
from moecc.ir.attention_axes import AttentionAxes, Program, facts_of
from moecc.ir.attention_kernels import ATTENTIONS, KERNELS, AttentionFacts, choose_attention
from moecc.ir.attributes import AttentionAttrs, Given
from moecc.ir.graph import Node
from moecc.types.dtypes import DTYPES
from moecc_backends.xla.kernels.attention_operands import AttentionArrays, AttentionRule
from moecc_backends.xla.kernels.cudnn import cudnn_attention
from moecc_backends.xla.kernels.query_blocks import block_attention
from moecc_backends.xla.lower.reductions import softmax
from moecc_backends.xla.trace.arrays import einsum
from moecc_backends.xla.trace.context import DIRECT, Context, lowering
from moecc_backends.xla.trace.dtypes import accumulator
from moecc_backends.xla.trace.options import AUTO
from moecc_backends.xla.trace.values import Named


@lowering("attention", names_result=True)
def _attention(ctx: Context, node: Node, *operands: Named) -> Named:
    attrs = AttentionAttrs.of_node(node)
    query, key, value, *more = operands
    given = dict(zip(attrs.given, more, strict=True))
    sizes = (query.sizes, key.sizes, value.sizes)
    kernel = _kernel(ctx, node, facts_of(*sizes, attrs, _program(ctx, query)))
    axes = AttentionAxes.of(*sizes, attrs)
    if kernel == "plain" or axes is None:
        return plain_attention(query, key, value, given, attrs)
    rule = AttentionRule(attrs.scale, attrs.cap, bool(attrs.causal), attrs.window)
    made = _RUN[kernel](ctx, rule, _arrays(axes, query, key, value, given))
    known = query.sizes | {a: value.size(a) for a in axes.wide}
    return Named(made.reshape([known[a] for a in axes.result]), axes.result)


def _program(ctx: Context, query: Named) -> Program:
    """Return what decides a kernel besides the attention itself."""
    dtype = next(name for name, kind in DTYPES.items() if kind.numpy == query.array.dtype)
    on_mesh = ctx.view.mesh is not None
    return Program(ctx.options.target, dtype, ctx.interceptor is not DIRECT, on_mesh)


def _kernel(ctx: Context, node: Node, facts: AttentionFacts) -> str:
    """Return the kernel that is chosen, or forced.

    Raises:
      InputError: one is forced that does not take this attention.
    """
    forced = ctx.options.attention
    if forced == AUTO:
        return choose_attention(facts).kernel.name
    kernel = next(k for k in KERNELS if k.name == forced)
    # Splash attention runs in Pallas' interpreter elsewhere.
    there = replace(facts, platform=kernel.platform) if forced == "splash" else facts
    reason = kernel.reason(there)
    if reason is not None:
        legal = [k.name for k in KERNELS if k.reason(facts) is None]
        raise InputError(
            f"this attention cannot be lowered with attention={forced}",
            expected=f"auto, {', '.join(legal)}",
            found=reason,
        )
    return forced


def _splash(ctx: Context, rule: AttentionRule, arrays: AttentionArrays) -> jax.Array:
    # Pallas takes a second to import.
    from moecc_backends.xla.kernels.splash import splash_attention

    return splash_attention(rule, arrays, interpret=ctx.options.target != "tpu")


def _cudnn(ctx: Context, rule: AttentionRule, arrays: AttentionArrays) -> jax.Array:
    return cudnn_attention(rule, arrays)


def _blocks(ctx: Context, rule: AttentionRule, arrays: AttentionArrays) -> jax.Array:
    return block_attention(replace(rule, by_key=ctx.options.target == "cpu"), arrays)


_RUN: dict[str, Callable[[Context, AttentionRule, AttentionArrays], jax.Array]] = {
    "splash": _splash,
    "cudnn": _cudnn,
    "blocks": _blocks,
}
"""The kernels that take arrays, by the names of `moecc.ir.attention_kernels`."""

assert (*_RUN, "plain") == ATTENTIONS, "options name what there is"


def _arrays(
    axes: AttentionAxes, query: Named, key: Named, value: Named, given: dict[Given, Named]
) -> AttentionArrays:
    """Return the operands as kernels take them."""
    dims = (axes.batch, axes.heads, axes.groups, axes.queries)
    sizes = query.sizes | key.sizes
    scores = (*dims, (axes.keys,))
    more = {word: _laid_out(x, scores, sizes) for word, x in given.items()}
    return AttentionArrays(
        _laid_out(query, (*dims, (axes.width,)), sizes),
        _laid_out(key, (*dims[:2], (axes.keys,), (axes.width,)), sizes),
        _laid_out(value, (*dims[:2], (axes.keys,), axes.wide), value.sizes),
        **more,
    )


def _laid_out(x: Named, dims: tuple[tuple[str, ...], ...], sizes: dict[str, int]) -> jax.Array:
    """Return `x` with the axes of each of `dims` as one; with size 1 where it has none of them."""
    shape = []
    axes: list[str] = []
    for names in dims:
        found = [a for a in names if a in x.axes]
        axes += names if found else []
        shape.append(prod(sizes[a] for a in names) if found else 1)
    full = [sizes[a] for a in axes]
    return jnp.broadcast_to(x.over(tuple(axes)), full).reshape(shape)


def plain_attention(
    query: Named, key: Named, value: Named, given: dict[Given, Named], attrs: AttentionAttrs
) -> Named:
    """Return the averaged values, product by product; the scores are one array."""
    kind, wide = query.array.dtype, accumulator(query.array.dtype)
    products = einsum(Named(query.array.astype(wide), query.axes), key, (attrs.over,))
    axes, scores = products.axes, products.array * attrs.scale
    if attrs.cap:
        scores = attrs.cap * jnp.tanh(scores / attrs.cap)
    if "bias" in given:
        scores = scores + given["bias"].over(axes).astype(wide)
    for seen in _seen(Named(scores, axes), given, attrs):
        scores = jnp.where(seen, scores, -jnp.inf)
    at = axes.index(attrs.along)
    sinks = given["sinks"].over(axes).astype(wide) if "sinks" in given else None
    weights = Named(_weights(scores, at, sinks).astype(kind), axes)
    return einsum(weights, value, (attrs.along,))


def _seen(scores: Named, given: dict[Given, Named], attrs: AttentionAttrs) -> Iterator[jax.Array]:
    """Yield what hides keys from queries, each to be broadcast over the scores."""
    for axis in attrs.causal:
        queries, keys = (
            Named(jnp.arange(scores.size(a)), (a,)).over(scores.axes) for a in (axis, attrs.along)
        )
        seen = queries >= keys
        yield seen & (queries - keys < attrs.window) if attrs.window else seen
    if "keep" in given:
        yield given["keep"].over(scores.axes)
    if "query_segments" in given:
        queries, keys = (given[w].over(scores.axes) for w in ("query_segments", "key_segments"))
        yield (queries == keys) | (queries == 0)


def _weights(scores: jax.Array, axis: int, sinks: jax.Array | None) -> jax.Array:
    """Return the softmax along `axis` of the scores and the sinks, less these."""
    if sinks is None:
        return softmax(scores, axis)
    sunk = jnp.broadcast_to(sinks, [n if i != axis else 1 for i, n in enumerate(scores.shape)])
    whole = softmax(jnp.concatenate([scores, sunk], axis), axis)
    return jax.lax.slice_in_dim(whole, 0, scores.shape[axis], axis=axis)
