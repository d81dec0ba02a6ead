"""Lowering of what changes or reads axes: renaming, splitting, slices, positions, tables."""

from __future__ import annotations

from functools import partial
from math import prod

import jax
import jax.numpy as jnp

from moecc.errors import InputError
from moecc.ir.graph import Node, where
from moecc.ir.ops.axes import (
    EmbeddingOp,
    JoinOp,
    MergeOp,
    OneHotOp,
    RenameOp,
    SliceOp,
    SplitOp,
    UpdateSliceOp,
)
from moecc_backends.xla.trace.context import DeviceView, TraceContext, lowering, lowering_along
from moecc_backends.xla.trace.values import (
    Deferred,
    DeferredRows,
    Named,
    Operand,
    Rows,
    accumulator,
    lifted,
    varies,
)

Array = jax.Array


@lowering("rename")
def _rename(ctx: TraceContext, node: Node, x: Operand) -> Operand:
    attrs = RenameOp.of_node(node)
    old, new = attrs.axis, attrs.to
    axes = tuple(new if a == old else a for a in x.axes)
    return x.with_array(x.array, axes) if isinstance(x, Rows) else Named(x.array, axes)


@lowering_along("split")
def _split(ctx: TraceContext, node: Node, x: Named) -> Named:
    attrs = SplitOp.of_node(node)
    at, shape = x.axes.index(attrs.axis), x.array.shape
    sizes = (size for _, size in ctx.view.attrs(node)["into"])
    array = x.array.reshape(*shape[:at], *sizes, *shape[at + 1 :])
    return Named(array, (*x.axes[:at], *(n for n, _ in attrs.into), *x.axes[at + 1 :]))


@lowering_along("merge")
def _merge(ctx: TraceContext, node: Node, x: Named) -> Named:
    attrs = MergeOp.of_node(node)
    at = x.axes.index(attrs.axes[0])
    before, after = (
        tuple(a for a in axes if a not in attrs.axes) for axes in (x.axes[:at], x.axes[at:])
    )
    moved, sizes = x.to((*before, *attrs.axes, *after)), x.sizes
    merged = prod(sizes[a] for a in attrs.axes)
    shape = (*(sizes[a] for a in before), merged, *(sizes[a] for a in after))
    return Named(moved.array.reshape(shape), (*before, attrs.into, *after))


@lowering_along("slice")
def _slice(ctx: TraceContext, node: Node, x: Named) -> Named:
    attrs = SliceOp.of_node(node)
    at = x.axes.index(attrs.axis)
    return Named(jax.lax.slice_in_dim(x.array, attrs.start, attrs.stop, axis=at), x.axes)


@lowering("positions", takes_deferred=True)
def _positions(ctx: TraceContext, node: Node, like: Operand | DeferredRows) -> Operand | Deferred:
    axis = node.result.type.axes[0]
    if isinstance(like, DeferredRows) and axis.name not in ("expert", "group"):
        return like.deferred
    if isinstance(axis.size, int):
        size = axis.size // ctx.view.shard_count(axis)
    elif isinstance(like, Named):
        size = like.size(axis.name)
    elif axis.name == "group":
        size = (like.layout if isinstance(like, Rows) else like).routing.groups
    else:
        assert isinstance(like, Rows), "other axes are of rows that are there"
        size = like.inner().size(axis.name)
    local = jnp.arange(size, dtype=jnp.int32) + ctx.view.offset(axis, size)
    return Named(local, (axis.name,))


@lowering("embedding")
def _embedding(ctx: TraceContext, node: Node, table: Operand, ids: Operand) -> Operand:
    axis, type = EmbeddingOp.of_node(node).axis, node.operands[0].type
    declared, view = type[axis], ctx.view
    in_columns = any(view.shard_count(a) > 1 for a in type if a != declared)

    def pick(rows: Named, index: Named) -> Named:
        columns = tuple(a for a in rows.axes if a != axis)
        local, at, take = rows.to((axis, *columns)).array, index.array, _take
        if in_columns:
            local = view.varying(local, varies(at))
            take = partial(_take_of_columns, len(local))
        if view.shard_count(declared) == 1:
            return Named(take(local, at), (*index.axes, *columns))
        # Rows of other shards are zeros here.
        at = at - view.offset(declared, len(local))
        is_own = (at >= 0) & (at < len(local))
        picked = take(local, jnp.where(is_own, at, 0))
        picked = jnp.where(is_own.reshape(*at.shape, *[1] * len(columns)), picked, 0)
        return Named(picked, (*index.axes, *columns))

    # Either may be rows of experts, but not both: their axes would be there twice.
    if isinstance(ids, Rows):
        assert isinstance(table, Named), "one of the two is"
        return ids.of(pick(table, ids.inner())).padded(None, 0)
    return lifted(table, lambda rows: pick(rows, ids))


def _take(rows: Array, index: Array) -> Array:
    return jnp.take(rows, index, axis=0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _take_of_columns(count: int, columns: Array, index: Array) -> Array:
    """Pick rows of a shard of the columns of a table of `count` rows.

    The gradient of a row is the sum over the tokens of many devices.  It is added up in float32: in
    bfloat16, what one token adds to a sum of 256 others is lost.
    """
    return _take(columns, index)


def _take_backward(count: int, index: Array, gradient: Array) -> tuple[Array, None]:
    kind = jnp.promote_types(gradient.dtype, jnp.float32)
    shape = (count, *gradient.shape[index.ndim :])
    zeros = DeviceView().varying(jnp.zeros(shape, kind), varies(gradient))
    return zeros.at[index].add(gradient.astype(kind)).astype(gradient.dtype), None


_take_of_columns.defvjp(
    lambda count, columns, index: (_take(columns, index), index), _take_backward
)


@lowering_along("one_hot")
def _one_hot(ctx: TraceContext, node: Node, ids: Named) -> Named:
    ((name, size),) = OneHotOp.of_node(node).into
    assert isinstance(size, int), "the type is checked"
    # Counts are made of these, which a narrow type would round.
    kind = accumulator(ctx.dtype)
    return Named(jax.nn.one_hot(ids.array, size, dtype=kind), (*ids.axes, name))


# Lowering of chunks: of arrays, slots under a capacity among them.


@lowering("chunk")
def _chunk(ctx: TraceContext, node: Node, x: Operand) -> Named:
    attrs, full = ctx.view.attrs(node), _named(node, x)
    at, size = full.axes.index(attrs["axis"]), full.size(attrs["axis"])
    shape = full.array.shape
    pieces = (attrs["parts"], attrs["of"], size // (attrs["parts"] * attrs["of"]))
    cells = full.array.reshape(*shape[:at], *pieces, *shape[at + 1 :])
    picked = jnp.take(cells, attrs["at"], at + 1)
    return Named(picked.reshape(*shape[:at], size // attrs["of"], *shape[at + 1 :]), full.axes)


@lowering("join")
def _join(ctx: TraceContext, node: Node, *chunks: Operand) -> Named:
    first, parts = _named(node, chunks[0]), ctx.view.attrs(node)["parts"]
    axis = JoinOp.of_node(node).axis
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


# Lowering of ranges that are written into a value.


@lowering("update_slice")
def _update_slice(ctx: TraceContext, node: Node, x: Named, update: Named, start: Named) -> Named:
    part = update.to(x.axes).array.astype(x.array.dtype)
    at = x.axes.index(UpdateSliceOp.of_node(node).axis)
    # JAX counts a negative start from the end; the operation does not.
    first = jnp.maximum(start.array, 0)
    return Named(jax.lax.dynamic_update_slice_in_dim(x.array, part, first, at), x.axes)


# Regions of functions of JAX: they run in the function, where blocks are replaced.


@lowering("jax")
def _jax(ctx: TraceContext, node: Node, *operands: Operand) -> Operand:
    raise InputError(
        "a region of JAX is computed by its function alone",
        where=where(node),
        hint="moe(function) of `moecc.jax` runs the blocks in it",
    )
