"""Lowering of bounded receive buffers, where a program sees the tokens of all groups."""

from __future__ import annotations

import jax.numpy as jnp

from moecc.ir.attributes import WithinBufferAttrs
from moecc.ir.graph import Node
from moecc.ir.table.buffers import buffer_rows
from moecc_backends.xla.trace.context import Context, lowering
from moecc_backends.xla.trace.values import Named


@lowering("within_buffer")
def _within_buffer(ctx: Context, node: Node, experts: Named, slots: Named, counts: Named) -> Named:
    attrs, tokens = ctx.view.attrs(node), WithinBufferAttrs.of_node(node).tokens
    (choice,) = (a for a in experts.axes if a not in tokens)
    layout = (*tokens, choice)
    whole = experts.to(layout).array
    chosen, taken = (x.to(layout).array.reshape(-1, whole.shape[-1]) for x in (experts, slots))
    counted = counts.to(("group", "expert")).array.astype(jnp.int32)
    groups, num_experts = counted.shape
    blocks, parts = attrs["blocks"], attrs["parts"]
    mine = groups // _peers(ctx, node)
    each = chosen.shape[0] // mine
    rows = buffer_rows(attrs, each * groups // blocks, chosen.shape[1])
    cells = counted.reshape(blocks, groups // blocks, parts, num_experts // parts)
    line = cells.transpose(0, 2, 1, 3).reshape(blocks, parts, -1)
    room = jnp.clip(rows - (jnp.cumsum(line, -1) - line), 0, line)
    back = room.reshape(blocks, parts, groups // blocks, num_experts // parts)
    limit = back.transpose(0, 2, 1, 3).reshape(groups, num_experts)
    first = ctx.view.shard_index(_over(node)) * mine
    group = first + jnp.arange(chosen.shape[0]) // max(each, 1)
    there = (taken >= 0) & (chosen >= 0) & (chosen < num_experts)
    keep = there & (taken < limit[group[:, None], jnp.where(there, chosen, 0)])
    return Named(keep.reshape(whole.shape), layout).to(experts.axes)


def _over(node: Node) -> tuple[str, ...]:
    """Return the mesh axes along which the counts are of all tokens, and the tokens of some."""
    tokens = node.operands[0].type[WithinBufferAttrs.of_node(node).tokens[0]].mesh
    return tokens[len(node.operands[2].type["group"].mesh) :]


def _peers(ctx: Context, node: Node) -> int:
    return 1 if ctx.view.mesh is None else ctx.view.mesh.size(_over(node))
