"""What lowerings do with values under trace, whether they are arrays or rows of experts."""

from __future__ import annotations

import string
from collections.abc import Callable
from math import prod

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from moecc_backends.xla.trace.values import Named, Operand, RowLayout, Rows, accumulator

# Padding rows, which have no token: zeroed where they would count, or poisoned.
#
# Where choices are dropped, fewer rows are used than there are.  What the others hold is left to
# whatever computed it (a kernel of an accelerator may leave anything there), and nothing may read
# it.
# A sum over rows would: the gradient of what rows share.  There it is masked.


@jax.custom_vjp
def zeroed(rows: Array, is_used: Array) -> Array:
    """Return ``[rows, …]`` with zeros in padding rows, in values and cotangents."""
    return _selected(rows, is_used)


def _selected(rows: Array, is_used: Array) -> Array:
    return jnp.where(_broadcast_over(is_used, rows), rows, jnp.zeros((), rows.dtype))


@jax.custom_vjp
def with_masked_gradient(rows: Array, is_used: Array) -> Array:
    """Return `rows` as they are; the cotangent is zeroed in padding rows."""
    return rows


# A choice of the two would keep the mask as wide as the rows for its gradient.
zeroed.defvjp(
    lambda rows, is_used: (_selected(rows, is_used), is_used),
    lambda is_used, cotangent: (_selected(cotangent, is_used), None),
)
with_masked_gradient.defvjp(
    lambda rows, is_used: (rows, is_used),
    lambda is_used, cotangent: (_selected(cotangent, is_used), None),
)


def poisoned_values(rows: Array, is_used: Array) -> Array:
    """Return floating-point `rows` with NaN in padding rows; cotangents as they are."""
    if not jnp.issubdtype(rows.dtype, jnp.floating):
        return rows
    # Not a choice of the two, whose gradient would be masked.
    nothing = jnp.where(_broadcast_over(is_used, rows), 0, jnp.asarray(jnp.nan, rows.dtype))
    return rows + nothing


@jax.custom_vjp
def with_poisoned_gradient(rows: Array, is_used: Array) -> Array:
    """Return `rows` as they are; the cotangent is NaN in padding rows."""
    return rows


with_poisoned_gradient.defvjp(
    lambda rows, is_used: (rows, is_used),
    lambda is_used, cotangent: (poisoned_values(cotangent, is_used), None),
)


def poisoned(rows: Array, is_used: Array) -> Array:
    """Return `rows` with NaN in padding rows, in values and cotangents."""
    if not jnp.issubdtype(rows.dtype, jnp.floating):
        return rows
    return with_poisoned_gradient(poisoned_values(rows, is_used), is_used)


def _broadcast_over(is_used: Array, rows: Array) -> Array:
    return is_used.reshape(-1, *[1] * (rows.ndim - 1))


def lifted(x: Operand, function: Callable[[Named], Named]) -> Operand:
    """Apply to `x` what does something along its own axes; rows keep their layout."""
    return lifted_all(x, lambda full: (function(full),))[0]


def lifted_all(x: Operand, function: Callable[[Named], tuple[Named, ...]]) -> tuple[Operand, ...]:
    """Apply to `x` a function of several results, as `lifted` does."""
    if isinstance(x, Named):
        return function(x)
    return tuple(_packed(result, x) for result in function(x.inner()))


def _packed(result: Named, like: Rows) -> Rows:
    inner = tuple(a for a in result.axes if a != "rows")
    return like.with_array(result.to(("rows", *inner)).array, inner)


def elementwise(function: Callable[..., Array], *operands: Operand) -> Operand:
    """Apply `function` to operands broadcast over the axes of the one that has them all."""
    layout = next((x.layout for x in operands if isinstance(x, Rows)), None)
    named = [x if isinstance(x, Named) else x.inner() for x in operands]
    if layout is not None:
        named = [per_row(x, layout) for x in operands]
    axes = max((x.axes for x in named), key=len)
    result = function(*(x.over(axes) for x in named))
    if layout is None:
        return Named(result, axes)
    inner = tuple(a for a in axes if a != "rows")
    return Rows(Named(result, axes).to(("rows", *inner)).array, inner, layout)


def einsum(x: Named, w: Named, over: tuple[str, ...], kind: DTypeLike | None = None) -> Named:
    """Sum the product of two arrays over the axes `over`; others that both have are batch axes.

    Args:
      x: one of them; the result has its type.
      w: the other.
      over: what is summed over.
      kind: the type that the product is asked for in; float32 at least by default.
    """
    result = (
        *(a for a in x.axes if a not in over),
        *(a for a in w.axes if a not in over and a not in x.axes),
    )
    wide = kind or accumulator(x.array.dtype)
    if _is_one_row(x, w, over):
        return _vector_product(x, w, over, wide).to(result)
    letters = dict(zip(dict.fromkeys((*x.axes, *w.axes)), string.ascii_letters, strict=False))
    spell = ["".join(letters[a] for a in axes) for axes in (x.axes, w.axes, result)]
    array = jnp.einsum(
        f"{spell[0]},{spell[1]}->{spell[2]}",
        x.array,
        w.array,
        preferred_element_type=wide,
    )
    return Named(array.astype(x.array.dtype), result)


def _is_one_row(x: Named, w: Named, over: tuple[str, ...]) -> bool:
    """Whether all that is not summed over of `x` is one element, and a matrix multiplies it."""
    shared = set(x.axes) & set(w.axes)
    return shared == set(over) and len(w.axes) > len(over) and x.array.size == prod(
        x.size(a) for a in over
    )  # fmt: skip


def _vector_product(x: Named, w: Named, over: tuple[str, ...], kind: DTypeLike) -> Named:
    """Multiply a matrix with a vector: on a CPU twice as quick as a product with one row.

    A step of decoding is made of these.  The matrix is read as it is stored.
    """
    columns = tuple(a for a in w.axes if a not in over)
    outer = tuple(a for a in x.axes if a not in over)
    vector = x.to((*outer, *over)).array.reshape([x.size(a) for a in over])
    at = tuple(w.axes.index(a) for a in over), tuple(range(len(over)))
    product = jax.lax.dot_general(
        w.array, vector, (at, ((), ())), preferred_element_type=kind
    )  # fmt: skip
    shape = [1] * len(outer) + [w.size(a) for a in columns]
    return Named(product.astype(x.array.dtype).reshape(shape), (*outer, *columns))


def per_row(value: Operand, layout: RowLayout) -> Named:
    """Return `value` so that it broadcasts against rows of experts, under the axis ``rows``.

    A value with an expert axis, such as the bias of each expert, is picked by the row's expert,
    and one with a group axis by the group of the row's token.  Rows without a token reach no
    gradient of what they share with others.
    """
    if isinstance(value, Rows):
        return value.inner()
    if "group" in value.axes:
        return _masked(_per_group(value, layout), layout)
    if "expert" not in value.axes:
        return _masked(value, layout)
    inner = tuple(a for a in value.axes if a != "expert")
    return Named(layout.by_expert(value.to(("expert", *inner)).array), ("rows", *inner))


def broadcast_like(value: Operand, x: Operand) -> Named:
    """Return `value`, whose axes are among those of `x`, so that it broadcasts against `x`."""
    if isinstance(x, Rows):
        return per_row(value, x.layout)
    assert isinstance(value, Named), "it has no axis that the other lacks"
    return value


def with_masked_rows(x: Rows) -> Rows:
    """Return `x`; no cotangent of rows without a token gets past it."""
    if x.layout.is_full or not jnp.issubdtype(x.array.dtype, jnp.floating):
        return x
    return x.with_array(with_masked_gradient(x.array, x.layout.is_used))


def zeroed_rows(x: Rows) -> Rows:
    """Return `x` with zeros in the rows without a token, in values and cotangents."""
    if x.layout.is_full or x.are_tokens:
        return x
    return x.with_array(zeroed(x.array, x.layout.is_used))


def poisoned_rows(x: Rows) -> Rows:
    """Return `x` with NaN in the rows without a token, in values and cotangents."""
    return x if x.layout.is_full else x.with_array(poisoned(x.array, x.layout.is_used))


def _masked(value: Named, layout: RowLayout) -> Named:
    """Return `value` for each row, with a gradient from the rows alone that have a token."""
    if layout.is_full or not jnp.issubdtype(value.array.dtype, jnp.floating):
        return value
    is_used, array = layout.is_used, value.array
    if "rows" not in value.axes:
        array = jnp.broadcast_to(array, (is_used.size, *array.shape))
    inner = tuple(a for a in value.axes if a != "rows")
    return Named(with_masked_gradient(array, is_used), ("rows", *inner))


def _per_group(value: Named, layout: RowLayout) -> Named:
    inner = tuple(a for a in value.axes if a not in ("group", "expert"))
    by_group = value.to(tuple(a for a in ("group", "expert") if a in value.axes) + inner).array
    group = layout.row_groups
    index = (group, layout.row_experts) if "expert" in value.axes else (group,)
    return Named(by_group[index], ("rows", *inner))
