"""Lowering of what works element by element, and of what changes or reads axes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import isfinite, pi, prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.dtypes import canonicalize_dtype
from jax.typing import DTypeLike

from moecc.errors import InputError
from moecc.ir.formula import Formula, parse_formula
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
from moecc.ir.ops.elementwise import CastOp, ConstantOp, MaskOp, PointwiseOp, ScaleOp
from moecc.ir.ops.random import FoldKeyOp, RandomNormalOp, RandomUniformOp
from moecc.types import BY_TORCH, DTYPES, is_lossless
from moecc_backends.xla.trace.context import (
    DeviceView,
    TraceContext,
    bits_at,
    lowering,
    lowering_along,
)
from moecc_backends.xla.trace.values import (
    Deferred,
    DeferredRows,
    Named,
    Names,
    Operand,
    Rows,
    accumulator,
    elementwise,
    is_float,
    lifted,
    varies,
)

# What the names of formulas are in JAX (`moecc.ir.formula`).

Term = Any
"""An array, or a number that takes the type of the array beside it."""


def evaluate(formula: Formula, x: Array) -> Array:
    """Return a formula of each element of `x`, in the type of `x`."""
    functions = {**FUNCTIONS, "narrow": lambda v: v.astype(x.dtype)}
    term: Term = formula.evaluate(functions, x)
    return jnp.asarray(term, x.dtype)


def _alike(*terms: Term) -> list[Any]:
    """Return numbers as the type of the arrays among them, which they must not widen."""
    dtype = next((x.dtype for x in terms if isinstance(x, Array)), None)
    return [x if isinstance(x, Array) else jnp.asarray(x, dtype) for x in terms]


def _of_all(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *terms: function(*_alike(*terms))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(jnp, name) for name in (
        "abs", "sign", "exp", "exp2", "expm1", "log", "log1p", "sin", "cos", "tan", "asin", "acos",
        "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "sqrt", "cbrt", "square",
        "floor", "ceil", "round",
    )},
    **{name: _of_all(getattr(jnp, name)) for name in (
        "maximum", "minimum", "atan2", "logaddexp", "less", "less_equal", "greater",
        "greater_equal", "equal", "not_equal",
    )},
    "add": _of_all(jnp.add),
    "sub": _of_all(jnp.subtract),
    "mul": _of_all(jnp.multiply),
    "div": _of_all(jnp.divide),
    "neg": jnp.negative,
    "pow": lambda x, y: lax.integer_pow(x, int(y)) if _is_whole(y) else jnp.power(*_alike(x, y)),
    "clamp": lambda low, x, high: lax.clamp(*_alike(low, x, high)),
    "where": lambda condition, a, b: jnp.where(condition, *_alike(a, b)),
    "and": jnp.logical_and,
    "or": jnp.logical_or,
    "xor": jnp.logical_xor,
    "not": jnp.logical_not,
    "sigmoid": lax.logistic,
    "rsqrt": lax.rsqrt,
    "erf": lax.erf,
    "erfc": lax.erfc,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "stop_gradient": lax.stop_gradient,
    "wide": lambda x: x.astype(accumulator(x.dtype)),
}  # fmt: skip
"""By name; ``narrow`` depends on the operand."""


def _is_whole(power: Term) -> bool:
    return isinstance(power, float) and power == int(power) and abs(power) < 64


ELEMENTWISE: dict[str, Callable[..., Array]] = {
    **{name: FUNCTIONS[name] for name in (
        "relu", "sigmoid", "tanh", "exp", "log", "square", "rsqrt", "neg", "stop_gradient",
        "add", "sub", "mul", "div", "maximum", "minimum", "less", "equal",
    )},
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    # JAX has none for types narrower than float32.
    "normal_cdf": lambda x: jax.scipy.special.ndtr(x.astype(accumulator(x.dtype))).astype(x.dtype),
}  # fmt: skip
"""Operations that are one function of jax."""


for _name, _function in ELEMENTWISE.items():
    lowering(_name)(partial(lambda f, ctx, node, *operands: elementwise(f, *operands), _function))


@lowering("pointwise")
def _pointwise(ctx: TraceContext, node: Node, x: Operand) -> Operand:
    formula = parse_formula(PointwiseOp.of_node(node).function)
    return elementwise(lambda v: evaluate(formula, v), x)


@lowering("scale")
def _scale(ctx: TraceContext, node: Node, x: Operand) -> Operand:
    return elementwise(lambda v: v * jnp.asarray(ScaleOp.of_node(node).by, v.dtype), x)


@lowering("cast")
def _cast(ctx: TraceContext, node: Node, x: Operand) -> Operand:
    dtype = DTYPES[CastOp.of_node(node).dtype]
    if not dtype.is_float:
        wanted = canonicalize_dtype(dtype.numpy)
        return elementwise(lambda v: v.astype(wanted), x)
    before = node.operands[0].type.dtype
    if before.is_float and is_lossless(before, dtype):
        return x  # what is wider than the policy, as what routers make, stays so
    # A cast may round; what is computed in afterwards is a matter of the policy.
    narrow = ctx.dtype if is_lossless(before, dtype) else dtype.numpy
    if np.dtype(narrow).itemsize > np.dtype(ctx.dtype).itemsize:
        narrow = ctx.dtype
    return elementwise(lambda v: v.astype(narrow).astype(ctx.dtype), x)


@lowering("select")
def _select(ctx: TraceContext, node: Node, condition: Operand, a: Operand, b: Operand) -> Operand:
    return elementwise(jnp.where, condition, a, b)


@lowering("mask")
def _mask(ctx: TraceContext, node: Node, x: Operand, keep: Operand) -> Operand:
    fill = MaskOp.of_node(node).fill
    return elementwise(lambda v, k: jnp.where(k, v, number(fill, v.dtype)), x, keep)


@lowering("constant")
def _constant(ctx: TraceContext, node: Node) -> Operand:
    attrs = ConstantOp.of_node(node)
    declared = DTYPES[attrs.dtype]
    dtype = ctx.dtype if declared.is_float else canonicalize_dtype(declared.numpy)
    return Named(number(attrs.value, dtype), ())


def number(value: float, dtype: DTypeLike) -> Array:
    """Return a number in `dtype`; a finite number becomes the nearest finite one.

    A bound such as −1e30 would be −∞ in float16, whose product with zero is NaN.
    """
    if is_float(dtype) and isfinite(value):
        low, high = BY_TORCH[jnp.dtype(dtype).name].limits
        value = min(max(value, low), high)
    return jnp.asarray(value, dtype)


@lowering("broadcast")
def _broadcast(ctx: TraceContext, node: Node, x: Operand, like: Operand) -> Operand:
    def widened(a: Array, b: Array) -> Array:
        kind = a.dtype
        if is_float(kind):
            # A 1 for each choice is summed to a count, which a narrow type would round.
            kind = jnp.promote_types(kind, _kind(b, ctx))
        return jnp.broadcast_to(a.astype(kind), b.shape)

    return elementwise(widened, x, like)


# Lowering of random numbers: those of a shard are those that the whole has there.


@lowering("fold_key")
def _fold_key(ctx: TraceContext, node: Node, key: Named) -> Operand:
    return Named(jax.random.fold_in(key.array, FoldKeyOp.of_node(node).by), ())


def _uniform(
    ctx: TraceContext, key: Array, node: Node, axes: Names, shape: tuple[int, ...]
) -> Array:
    """Return 23 random bits for each element as numbers on [0, 1)."""
    type = node.result.type
    numbers = ctx.view.element_numbers(type.with_axes(type[a] for a in axes), shape)
    # A shard has the numbers that the whole has there.
    bits = jax.random.bits(key, shape, jnp.uint32) if numbers is None else bits_at(key, numbers)
    return (bits >> 9).astype(accumulator(ctx.dtype)) / 2**23


def _numbered(like: Named) -> tuple[Names, tuple[int, ...]]:
    # In alphabetical order, so that the order of the axes means nothing.
    axes = tuple(sorted(like.axes))
    return axes, tuple(like.size(a) for a in axes)


@lowering("random_uniform")
def _random_uniform(ctx: TraceContext, node: Node, key: Named, like: Named) -> Operand:
    attrs = RandomUniformOp.of_node(node)
    axes, shape = _numbered(like)
    low, high = attrs.low, attrs.high
    numbers = low + _uniform(ctx, key.array, node, axes, shape) * (high - low)
    return Named(numbers.astype(_kind(like.array, ctx)), axes).to(like.axes)


@lowering("random_normal")
def _random_normal(ctx: TraceContext, node: Node, key: Named, like: Named) -> Operand:
    axes, shape = _numbered(like)
    keys = (jax.random.fold_in(key.array, by) for by in (0, 1))
    first, second = (_uniform(ctx, k, node, axes, shape) for k in keys)
    std = RandomNormalOp.of_node(node).std
    numbers = jnp.sqrt(-2 * jnp.log1p(-first)) * jnp.cos(2 * pi * second) * std
    return Named(numbers.astype(_kind(like.array, ctx)), axes).to(like.axes)


def _kind(like: Array, ctx: TraceContext) -> DTypeLike:
    return like.dtype if is_float(like.dtype) else accumulator(ctx.dtype)


# Lowering of what changes or reads axes: renaming, splitting, slices, positions, tables.


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
    return Named(lax.slice_in_dim(x.array, attrs.start, attrs.stop, axis=at), x.axes)


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
    kind = accumulator(gradient.dtype)
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
    return Named(lax.dynamic_update_slice_in_dim(x.array, part, first, at), x.axes)


# Regions of functions of JAX: they run in the function, where blocks are replaced.


@lowering("jax")
def _jax(ctx: TraceContext, node: Node, *operands: Operand) -> Operand:
    raise InputError(
        "a region of JAX is computed by its function alone",
        where=where(node),
        hint="moe(function) of `moecc.jax` runs the blocks in it",
    )
