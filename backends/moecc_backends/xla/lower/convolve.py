"""Lowering of convolutions to XLA's, after the batch axes have been made one."""

from __future__ import annotations

from math import prod

import jax
from jax.typing import DTypeLike

from moecc.ir.attributes import ConvolveAttrs
from moecc.ir.graph import Node
from moecc_backends.xla.trace.arrays import lifted
from moecc_backends.xla.trace.context import Context, lowering
from moecc_backends.xla.trace.dtypes import product_type
from moecc_backends.xla.trace.values import Named, Operand


@lowering("convolve")
def _convolve(ctx: Context, node: Node, x: Operand, w: Operand) -> Operand:
    attrs = ConvolveAttrs.of_node(node)
    assert isinstance(w, Named), "the type rule refuses ragged weights"
    kind = product_type(w.array.dtype, ctx.options.target)
    return lifted(x, lambda full: _windows(full, w, attrs, kind))


def _windows(x: Named, w: Named, attrs: ConvolveAttrs, kind: DTypeLike) -> Named:
    over, along, taps = attrs.over, attrs.along, attrs.taps
    batch = tuple(n for n in x.axes if n not in (*over, *along))
    made = tuple(n for n in w.axes if n not in (*over, *taps))
    # XLA has one axis each for the batch, for what is summed, and for what is made.
    left = x.to((*batch, *over, *along)).array
    right = w.to((*made, *over, *taps)).array
    spread = left.reshape(
        prod(x.size(n) for n in batch), prod(x.size(n) for n in over), *map(x.size, along)
    )
    kernel = right.reshape(
        prod(w.size(n) for n in made), prod(w.size(n) for n in over), *map(w.size, taps)
    )
    out: jax.Array = jax.lax.conv_general_dilated(
        spread,
        kernel.astype(spread.dtype),
        window_strides=(attrs.stride,) * len(along),
        padding=((attrs.padding, attrs.padding),) * len(along),
        preferred_element_type=kind,
    )
    places = out.shape[2:]
    split = out.astype(x.array.dtype).reshape(*map(x.size, batch), *map(w.size, made), *places)
    order = [n for n in x.axes if n not in over] + list(made)
    return Named(split, (*batch, *made, *along)).to(tuple(order))
