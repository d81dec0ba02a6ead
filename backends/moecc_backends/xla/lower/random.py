"""Lowering of random numbers: those of a shard are those that the whole has there."""

from __future__ import annotations

from math import pi

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moecc.ir.attributes import FoldKeyAttrs, RandomNormalAttrs, RandomUniformAttrs
from moecc.ir.graph import Node
from moecc_backends.xla.trace.context import Context, lowering
from moecc_backends.xla.trace.device_view import bits_at
from moecc_backends.xla.trace.dtypes import accumulator
from moecc_backends.xla.trace.values import Named, Operand


@lowering("fold_key")
def _fold_key(ctx: Context, node: Node, key: Named) -> Operand:
    return Named(jax.random.fold_in(key.array, FoldKeyAttrs.of_node(node).by), ())


def _uniform(
    ctx: Context, key: jax.Array, node: Node, axes: tuple[str, ...], shape: tuple[int, ...]
) -> jax.Array:
    """Return 23 random bits for each element as numbers on [0, 1)."""
    type = node.result.type
    numbers = ctx.view.element_numbers(type.with_axes(type[a] for a in axes), shape)
    # A shard has the numbers that the whole has there.
    bits = jax.random.bits(key, shape, jnp.uint32) if numbers is None else bits_at(key, numbers)
    return (bits >> 9).astype(accumulator(ctx.dtype)) / 2**23


def _numbered(like: Named) -> tuple[tuple[str, ...], tuple[int, ...]]:
    # In alphabetical order, so that the order of the axes means nothing.
    axes = tuple(sorted(like.axes))
    return axes, tuple(like.size(a) for a in axes)


@lowering("random_uniform")
def _random_uniform(ctx: Context, node: Node, key: Named, like: Named) -> Operand:
    attrs = RandomUniformAttrs.of_node(node)
    axes, shape = _numbered(like)
    low, high = attrs.low, attrs.high
    numbers = low + _uniform(ctx, key.array, node, axes, shape) * (high - low)
    return Named(numbers.astype(_kind(like, ctx)), axes).to(like.axes)


@lowering("random_normal")
def _random_normal(ctx: Context, node: Node, key: Named, like: Named) -> Operand:
    axes, shape = _numbered(like)
    keys = (jax.random.fold_in(key.array, by) for by in (0, 1))
    first, second = (_uniform(ctx, k, node, axes, shape) for k in keys)
    std = RandomNormalAttrs.of_node(node).std
    numbers = jnp.sqrt(-2 * jnp.log1p(-first)) * jnp.cos(2 * pi * second) * std
    return Named(numbers.astype(_kind(like, ctx)), axes).to(like.axes)


def _kind(like: Named, ctx: Context) -> DTypeLike:
    is_float = jnp.issubdtype(like.array.dtype, jnp.floating)
    return like.array.dtype if is_float else accumulator(ctx.dtype)
