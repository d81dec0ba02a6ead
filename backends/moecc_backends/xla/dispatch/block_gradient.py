"""The gradient of a layer, block by block.

Forward the products with weights of experts are kept, for all rows.  Backward a block is gathered
again and everything but its products is computed again; the gradients of an expert's weights are
added to their place in those of all experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from moecc.ir.graph import Value
from moecc_backends.xla.dispatch.block_layer import Given, Layer
from moecc_backends.xla.dispatch.block_rows import BlockOfExpert, matrix_product
from moecc_backends.xla.dispatch.block_walk import BlockAt, Made
from moecc_backends.xla.kernels.grouped_matmul import block_product, outer_product
from moecc_backends.xla.trace.dtypes import accumulator
from moecc_backends.xla.trace.padding_rows import zeroed
from moecc_backends.xla.trace.typed_jax import named, varying_axes
from moecc_backends.xla.trace.values import DispatchLayout, Named, Operand, Rows

_MANY_ROWS = 128
"""From this many rows on it is quicker to sum over the first axis of both than to transpose one
(``benchmarks/moe_layer.py``)."""

Kept = tuple[Given, jax.Array, Sequence[jax.Array]]
"""What a layer is given, its rows in their order, and the products that they are made of."""


def has_gradient_by_block(given: Given) -> bool:
    """Whether sums in the types of the weights are wide enough, and no mesh has parts of them."""
    floats = [a for a in given.arrays if a is not None and _is_float(a)]
    return all(a.dtype.itemsize >= 4 and not varying_axes(a) for a in floats)


def forward(layer: Layer, given: Given) -> tuple[jax.Array, Kept]:
    """Return what each token gets, and what the gradient needs."""
    outside = layer.outside(given)

    def work(block: BlockOfExpert, own: Mapping[Value, jax.Array], place: BlockAt) -> Made:
        products: list[jax.Array] = []

        def product(rows: jax.Array, matrix: jax.Array, axis: int) -> jax.Array:
            products.append(matrix_product(rows, matrix, axis))
            return products[-1]

        values = {**outside, **layer.named(own)}
        made = layer.made(values, replace(block, product=product))
        return Made([made], products[:-1] if layer.ends_in_product else products)

    every = layer.walk(given, work)
    rows = named(every.rows[0], "experts")
    return layer.combined(given, rows), (given, rows, every.kept)


def backward(layer: Layer, kept: Kept, d_total: jax.Array) -> tuple[Given]:
    """Return the cotangents of what a layer is given."""
    given, rows, products = kept
    _, pull = jax.vjp(lambda r, g: layer.combined(given._replace(gates=g), r), rows, given.gates)
    d_rows, d_gates = pull(d_total)
    outside, stacks = layer.outside(given), layer.stacks(given)
    read = {v for n in layer.rows.nodes if n not in layer.moves for v in n.operands}
    smooth = [v for v, x in outside.items() if v in read and _is_float(x.array)]
    of_expert = [v for v in smooth if v in stacks]
    shared = [v for v in smooth if v not in stacks]

    def work(block: BlockOfExpert, own: Mapping[Value, jax.Array], place: BlockAt) -> Made:
        size = block.choice_of_row.size
        moved = dispatched(layer, outside, block)
        mine = [_of_block(p, d_rows.shape[0], place, size) for p in products]

        def made(
            rows: list[jax.Array], each: list[jax.Array], all_read: list[jax.Array]
        ) -> jax.Array:
            again = replace(block, product=_Kept(iter(mine), block.is_used))
            values: dict[Value, Operand] = {**outside, **layer.named(own)}
            values |= layer.named(dict(zip(of_expert, each, strict=True)))
            values |= {v: Named(a, outside[v].axes) for v, a in zip(shared, all_read, strict=True)}
            values |= {
                v: replace(x, array=a, layout=again)
                for (v, x), a in zip(moved.items(), rows, strict=True)
            }
            return layer.made(values, again)

        given_rows = [x.array for x in moved.values()]
        _, pull = jax.vjp(
            made, given_rows, [own[v] for v in of_expert], [outside[v].array for v in shared]
        )
        d_block = jax.lax.dynamic_slice_in_dim(d_rows, place.first, size)
        d_moved, d_own, d_shared = pull(zeroed(d_block, block.is_used))
        return Made(d_moved, (), d_own, d_shared)

    sums = layer.walk(given, work, of_expert)
    found = dict(zip(shared, sums.shared, strict=True))
    for v, array in zip(of_expert, sums.own, strict=True):
        found[v] = Named(array, stacks[v].axes).to(outside[v].axes).array
    for v, array in _of_tokens(layer, given, sums.rows).items():
        found[v] = found[v] + array if v in found else array
    arrays = [found.get(v) for v in outside]
    return (Given(None, None, None, None, None, arrays, d_gates),)


def dispatched(
    layer: Layer, outside: Mapping[Value, Named], layout: DispatchLayout
) -> dict[Value, Rows]:
    """Return the rows that are gathered from tokens, in a layout."""
    made = {
        n.result: replace(layer.rows, value=n.result).make(outside, layout) for n in layer.moves
    }
    return {v: x for v, x in made.items() if isinstance(x, Rows)}


def _of_tokens(layer: Layer, given: Given, d_moved: Sequence[jax.Array]) -> dict[Value, jax.Array]:
    """Return the cotangents of tokens, of those of the rows that were gathered from them."""
    outside, layout = layer.outside(given), layer.layout(given)
    sources = list(dict.fromkeys(n.operands[0] for n in layer.moves))

    def move(arrays: list[jax.Array]) -> list[jax.Array]:
        tokens = {v: Named(a, outside[v].axes) for v, a in zip(sources, arrays, strict=True)}
        return [x.array for x in dispatched(layer, {**outside, **tokens}, layout).values()]

    _, pull = jax.vjp(move, [outside[v].array for v in sources])
    return dict(zip(sources, pull(list(d_moved))[0], strict=True))


def _of_block(products: jax.Array, rows: int, place: BlockAt, size: int) -> jax.Array:
    """Return a block of products ``[parts, rows, …]``, each of which may be several a row."""
    times = products.shape[1] // rows
    at = place.of_kept(times, products.ndim)
    block: jax.Array = jax.lax.dynamic_slice(products, at, (1, size * times, *products.shape[2:]))
    return block[0]


def _is_float(array: jax.Array) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))


class _Kept:
    """Products in the order in which they were kept, as functions of what made them."""

    def __init__(self, products: Iterator[jax.Array], is_used: jax.Array) -> None:
        self.products = products
        self.is_used = is_used

    def __call__(self, rows: jax.Array, matrix: jax.Array, axis: int) -> jax.Array:
        """Return the next one, which multiplied `rows` with `matrix`."""
        used = jnp.repeat(self.is_used, rows.shape[0] // self.is_used.size)
        # Nothing reads the last product of an expert that ends in it, and it was not kept.
        made = next(self.products, None)
        if made is None:
            made = jnp.zeros((rows.shape[0], matrix.shape[1 - axis]), rows.dtype)
        return _kept(rows, matrix, made, used, axis)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _kept(
    rows: jax.Array, matrix: jax.Array, product: jax.Array, is_used: jax.Array, axis: int
) -> jax.Array:
    return product


def _kept_backward(
    axis: int, residuals: tuple[jax.Array, jax.Array, jax.Array], d_product: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    rows, matrix, is_used = residuals
    d_rows = block_product(d_product, matrix, 1 - axis).astype(rows.dtype)
    # Rows of other experts may hold anything, and zero times infinity is no zero.
    used, d_used = (jnp.where(is_used[:, None], x, 0) for x in (rows, d_product))
    outer = outer_product if rows.shape[0] < _MANY_ROWS else _outer_product_of_many
    return d_rows, outer(used, d_used, axis + 1).astype(matrix.dtype), None, None


def _outer_product_of_many(rows: jax.Array, d_rows: jax.Array, axis: int) -> jax.Array:
    left, right = (rows, d_rows) if axis == 1 else (d_rows, rows)
    kind = accumulator(left.dtype)
    dimensions = (((0,), (0,)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=kind)


_kept.defvjp(
    lambda rows, matrix, product, is_used, axis: (product, (rows, matrix, is_used)),
    _kept_backward,
)
