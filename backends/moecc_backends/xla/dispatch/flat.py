"""Named arrays as the flat ones that strategies move: tokens, slots and rows ``[…, width]``."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import jax
import jax.numpy as jnp

from moecc_backends.xla.trace.arrays import einsum, per_row
from moecc_backends.xla.trace.routing import Routing
from moecc_backends.xla.trace.values import SLOT_AXES, Named, RowLayout, Rows

Move = Callable[[jax.Array], jax.Array]


def tokens_to_slots(routing: Routing, x: Named, move: Move) -> Named:
    """Return slots, which `move` makes ``[expert * group * slot, width]`` of tokens."""
    tokens, rest, inner = _flat_tokens(routing, x)
    return Named(move(tokens).reshape(*routing.slot_shape, *inner), (*SLOT_AXES, *rest))


def slots_to_tokens(routing: Routing, slots: Named, move: Move) -> Named:
    """Return tokens, which `move` makes ``[tokens, width]`` of slots."""
    rest = tuple(a for a in slots.axes if a not in SLOT_AXES)
    array = slots.to((*SLOT_AXES, *rest)).array
    return _tokens(routing, array.reshape(prod(array.shape[:3]), *array.shape[3:]), rest, move)


def tokens_to_rows(layout: RowLayout, x: Named, move: Move) -> Rows:
    """Return rows of `layout`, which `move` makes ``[rows, width]`` of tokens."""
    tokens, rest, inner = _flat_tokens(layout.routing, x)
    return Rows(move(tokens).reshape(-1, *inner), rest, layout)


def rows_to_tokens(routing: Routing, rows: Rows, move: Move) -> Named:
    """Return tokens, which `move` makes ``[tokens, width]`` of rows."""
    return _tokens(routing, rows.array, rows.axes, move)


def gathered_matmul(x: Rows, weight: Named, over: tuple[str, ...]) -> Rows:
    """Multiply each row with a copy of its expert's weights.

    The copies are large: for few rows, or a product so odd that they are small.
    """
    product = einsum(x.inner(), per_row(weight, x.layout), over)
    inner = tuple(a for a in product.axes if a != "rows")
    return x.with_array(product.to(("rows", *inner)).array, inner)


def _flat_tokens(routing: Routing, x: Named) -> tuple[jax.Array, tuple[str, ...], tuple[int, ...]]:
    """Return tokens ``[tokens, width]``, and the axes and sizes that the width is made of."""
    rest = tuple(a for a in x.axes if a not in routing.tokens)
    source = x.to((*routing.tokens, *rest)).array
    inner = source.shape[len(routing.tokens) :]
    return source.reshape(routing.num_tokens, prod(inner)), rest, inner


def _tokens(routing: Routing, rows: jax.Array, rest: tuple[str, ...], move: Move) -> Named:
    axes, inner = (*routing.tokens, *rest), rows.shape[1:]
    shape = (*routing.token_sizes, *inner)
    if not routing.num_tokens:
        # From no rows at all nothing can be gathered.
        return Named(jnp.zeros(shape, rows.dtype), axes)
    return Named(move(rows.reshape(rows.shape[0], prod(inner))).reshape(shape), axes)
