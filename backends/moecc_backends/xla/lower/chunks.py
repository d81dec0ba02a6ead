"""Lowering of chunks: of arrays, slots under a capacity among them."""

from __future__ import annotations

import jax.numpy as jnp

from moecc.errors import InputError
from moecc.ir.attributes import JoinAttrs
from moecc.ir.graph import Node
from moecc.ir.verify import where
from moecc_backends.xla.trace.context import Context, lowering
from moecc_backends.xla.trace.values import Named, Operand


@lowering("chunk")
def _chunk(ctx: Context, node: Node, x: Operand) -> Named:
    attrs, full = ctx.view.attrs(node), _named(node, x)
    at, size = full.axes.index(attrs["axis"]), full.size(attrs["axis"])
    shape = full.array.shape
    pieces = (attrs["parts"], attrs["of"], size // (attrs["parts"] * attrs["of"]))
    cells = full.array.reshape(*shape[:at], *pieces, *shape[at + 1 :])
    picked = jnp.take(cells, attrs["at"], at + 1)
    return Named(picked.reshape(*shape[:at], size // attrs["of"], *shape[at + 1 :]), full.axes)


@lowering("join")
def _join(ctx: Context, node: Node, *chunks: Operand) -> Named:
    first, parts = _named(node, chunks[0]), ctx.view.attrs(node)["parts"]
    axis = JoinAttrs.of_node(node).axis
    at, size = first.axes.index(axis), first.size(axis)
    shape = first.array.shape
    arrays = [_named(node, c).to(first.axes).array for c in chunks]
    if parts == 1:
        return Named(jnp.concatenate(arrays, axis=at), first.axes)
    cells = [a.reshape(*shape[:at], parts, size // parts, *shape[at + 1 :]) for a in arrays]
    joined = jnp.stack(cells, at + 1)
    return Named(joined.reshape(*shape[:at], size * len(chunks), *shape[at + 1 :]), first.axes)


def _named(node: Node, x: Operand) -> Named:
    if isinstance(x, Named):
        return x
    raise InputError(
        "sorted rows have no chunks",
        where=where(node),
        expected="slots under a capacity, laid out by expert",
        hint="another dispatch lowering, or expert-parallel without chunks",
    )
