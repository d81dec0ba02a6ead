"""Lowering of attention as one operation: laid out for a kernel, or product by product."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp

from moecc.ir.attributes import AttentionAttrs, Given
from moecc.ir.graph import Node
from moecc_backends.xla.kernels.attention_operands import AttentionArrays, AttentionRule
from moecc_backends.xla.kernels.query_blocks import block_attention
from moecc_backends.xla.lower.reductions import softmax
from moecc_backends.xla.trace.arrays import einsum
from moecc_backends.xla.trace.context import Context, lowering
from moecc_backends.xla.trace.dtypes import accumulator
from moecc_backends.xla.trace.values import Named


@lowering("attention", names_result=True)
def _attention(ctx: Context, node: Node, *operands: Named) -> Named:
    attrs = AttentionAttrs.of_node(node)
    query, key, value, *more = operands
    given = dict(zip(attrs.given, more, strict=True))
    layout = AttentionLayout.of(query, key, value, attrs)
    if layout is None:
        return plain_attention(query, key, value, given, attrs)
    arrays = layout.arrays(query, key, value, given)
    rule = AttentionRule(attrs.scale, attrs.cap, bool(attrs.causal), attrs.window)
    axes = layout.result_axes
    sizes = query.sizes | {a: value.size(a) for a in layout.wide}
    return Named(block_attention(rule, arrays).reshape([sizes[a] for a in axes]), axes)


@dataclass(frozen=True)
class AttentionLayout:
    """The axes of an attention in the order in which kernels take them.

    Attributes:
      batch: the first axis that queries, keys and values share, or none.
      heads: the others that they share.
      groups: the axes that only queries have, but for that of their sequence.
      queries: the axis of the queries' sequence, or none.
      width: the axis that is summed over.
      keys: the axis of keys and values.
      wide: the axes that only values have.
    """

    batch: tuple[str, ...]
    heads: tuple[str, ...]
    groups: tuple[str, ...]
    queries: tuple[str, ...]
    width: str
    keys: str
    wide: tuple[str, ...]

    @classmethod
    def of(
        cls, query: Named, key: Named, value: Named, attrs: AttentionAttrs
    ) -> AttentionLayout | None:
        """Return the layout of operands; None where two of the three share an axis alone."""
        own = {attrs.over, attrs.along}
        shared = tuple(a for a in query.axes if a in key.axes and a in value.axes and a not in own)
        free = tuple(a for a in query.axes if a not in shared and a not in own)
        wide = tuple(a for a in value.axes if a not in shared and a != attrs.along)
        if {*key.axes} != {*shared, *own} or set(free) & set(wide):
            return None
        queries = attrs.causal or tuple(sorted(free, key=query.size)[-1:])
        groups = tuple(a for a in free if a not in queries)
        if set(queries) - set(free):
            return None
        return cls(shared[:1], shared[1:], groups, queries, attrs.over, attrs.along, wide)

    def arrays(
        self, query: Named, key: Named, value: Named, given: dict[Given, Named]
    ) -> AttentionArrays:
        """Return the operands as kernels take them."""
        dims = (self.batch, self.heads, self.groups, self.queries)
        sizes = query.sizes | key.sizes
        scores = (*dims, (self.keys,))
        more = {word: _laid_out(x, scores, sizes) for word, x in given.items()}
        return AttentionArrays(
            _laid_out(query, (*dims, (self.width,)), sizes),
            _laid_out(key, (*dims[:2], (self.keys,), (self.width,)), sizes),
            _laid_out(value, (*dims[:2], (self.keys,), self.wide), value.sizes),
            **more,
        )

    @property
    def result_axes(self) -> tuple[str, ...]:
        """The axes of the averaged values."""
        return (*self.batch, *self.heads, *self.groups, *self.queries, *self.wide)


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
