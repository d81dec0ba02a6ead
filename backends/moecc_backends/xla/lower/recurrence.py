"""Lowering of the gated delta rule: a state that is carried from key to key."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from moecc.ir.graph import Node
from moecc.ir.ops.recurrence import DeltaRuleOp, reads_as_it_goes, result_names
from moecc_backends.xla.trace.context import TraceContext, lowering
from moecc_backends.xla.trace.values import Named, accumulator


@lowering("delta_rule", names_result=True)
def _delta_rule(ctx: TraceContext, node: Node, *operands: Named) -> Named:
    attrs, mask = DeltaRuleOp.of_node(node), node.operands[-1]
    queries = reads_as_it_goes(ctx.outside.get(mask, mask), attrs.along)
    query, key, value, decay, rate, seen = operands
    wide, along = accumulator(query.array.dtype), attrs.along
    names = result_names(query.axes, key.axes, value.axes, attrs)
    # One state serves all queries where each reads what the keys up to its own have written; else
    # every query has a state of its own.
    axes = tuple(a for a in names if a != queries)
    state_axes = (*axes, attrs.over)

    def in_order(x: Named, axis: str) -> Array:
        """Return ``[axis, …]``, laid out for the state at each place."""
        array = x.over((axis, *state_axes))
        return array if array.dtype == jnp.bool_ else array.astype(wide)

    def write(state: Array, k: Array, v: Array, factor: Array, share: Array) -> Array:
        decayed = factor * state
        error = v - jnp.sum(decayed * k, axis=-1, keepdims=True)
        return decayed + k * (share * error)

    def read(state: Array, q: Array) -> Array:
        return jnp.sum(state * q, axis=-1)

    written = tuple(in_order(x, along) for x in (key, value, decay, rate))
    sizes = value.sizes | query.sizes
    # Of the operands, so that it varies over a mesh as they do.
    start = jnp.zeros([sizes[a] for a in state_axes], wide) + 0 * sum(x[0] for x in written)
    if queries is not None:

        def step(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
            q, *parts = inputs
            state = write(state, *parts)
            return state, read(state, q)

        _, result = lax.scan(step, start, (in_order(query, queries), *written))
        mixed = Named(result.astype(query.array.dtype), (queries, *axes))
        return mixed.to(names)

    def masked(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, None]:
        is_seen, *parts = inputs
        return jnp.where(is_seen, write(state, *parts), state), None

    start = start + 0 * query.over(state_axes).astype(wide)
    state, _ = lax.scan(masked, start, (in_order(seen, along), *written))
    result = read(state, query.over(state_axes).astype(wide))
    return Named(result.astype(query.array.dtype), axes)
