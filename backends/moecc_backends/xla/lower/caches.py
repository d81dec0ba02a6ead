"""Lowering of ranges that are written into a value."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moecc.ir.attributes import UpdateSliceAttrs
from moecc.ir.graph import Node
from moecc_backends.xla.trace.context import Context, lowering
from moecc_backends.xla.trace.values import Named


@lowering("update_slice")
def _update_slice(ctx: Context, node: Node, x: Named, update: Named, start: Named) -> Named:
    part = update.to(x.axes).array.astype(x.array.dtype)
    at = x.axes.index(UpdateSliceAttrs.of_node(node).axis)
    # JAX counts a negative start from the end; the operation does not.
    first = jnp.maximum(start.array, 0)
    return Named(jax.lax.dynamic_update_slice_in_dim(x.array, part, first, at), x.axes)
