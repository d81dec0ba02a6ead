"""Lowering of chunks: of arrays, slots under a capacity among them."""

from __future__ import annotations

import jax.numpy as jnp

from moecc.errors import InputError
from moecc.ir.graph import Node
from moecc.ir.verify import where
from moecc_backends.xla.trace.context import Context, lowering
from moecc_backends.xla.trace.values import Named, Operand


@lowering("chunk")
def _chunk(ctx: Context, node: Node, x: Operand) -> Named:
    attrs, full = ctx.local.attrs(node), _named(node, x)
    place, size = full.axes.index(attrs["axis"]), full.size(attrs["axis"])
    shape = full.array.shape
    pieces = (attrs["parts"], attrs["of"], size // (attrs["parts"] * attrs["of"]))
    cells = full.array.reshape(*shape[:place], *pieces, *shape[place + 1 :])
    picked = jnp.take(cells, attrs["at"], place + 1)
    return Named(
        picked.reshape(*shape[:place], size // attrs["of"], *shape[place + 1 :]), full.axes
    )


@lowering("join")
def _join(ctx: Context, node: Node, *chunks: Operand) -> Named:
    first, parts = _named(node, chunks[0]), ctx.local.attrs(node)["parts"]
    place, size = first.axes.index(node.attrs["axis"]), first.size(node.attrs["axis"])
    shape = first.array.shape
    arrays = [_named(node, c).to(first.axes).array for c in chunks]
    cells = [a.reshape(*shape[:place], parts, size // parts, *shape[place + 1 :]) for a in arrays]
    joined = jnp.stack(cells, place + 1)
    return Named(
        joined.reshape(*shape[:place], size * len(chunks), *shape[place + 1 :]), first.axes
    )


def _named(node: Node, x: Operand) -> Named:
    if isinstance(x, Named):
        return x
    raise InputError(
        "packed rows have no chunks",
        where=where(node),
        expected="slots under a capacity, laid out by expert",
        hint="another dispatch lowering, or expert-parallel without chunks",
    )
