"""Lowering of what works element by element."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import isfinite

import jax
import jax.numpy as jnp
import numpy as np
from jax.dtypes import canonicalize_dtype
from jax.typing import DTypeLike

from moecc.ir.attributes import (
    CastAttrs,
    ConstantAttrs,
    MaskAttrs,
    PointwiseAttrs,
    ScaleAttrs,
)
from moecc.ir.formula import parse_formula
from moecc.ir.graph import Node
from moecc.types.dtypes import BY_TORCH, DTYPES, is_lossless
from moecc_backends.xla.lower.formula import evaluate
from moecc_backends.xla.trace.arrays import elementwise
from moecc_backends.xla.trace.context import Context, lowering
from moecc_backends.xla.trace.dtypes import accumulator
from moecc_backends.xla.trace.values import Named, Operand

Array = jax.Array


def _normal_cdf(x: Array) -> Array:
    """Return Φ(x), computed in float32 at least: JAX has none for narrower types."""
    wide = jax.scipy.special.ndtr(x.astype(accumulator(x.dtype)))
    return wide.astype(x.dtype)


_UNARY: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "exp": jnp.exp,
    "log": jnp.log,
    "square": jnp.square,
    "rsqrt": jax.lax.rsqrt,
    "normal_cdf": _normal_cdf,
    "neg": jnp.negative,
    "stop_gradient": jax.lax.stop_gradient,
}

_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": jnp.add,
    "sub": jnp.subtract,
    "mul": jnp.multiply,
    "div": jnp.divide,
    "maximum": jnp.maximum,
    "minimum": jnp.minimum,
    "less": jnp.less,
    "equal": jnp.equal,
}


def _register(table: dict[str, Callable[..., Array]]) -> None:
    """Register operations that are one function of elements."""
    for name, function in table.items():
        lowering(name)(partial(_apply, function))


def _apply(function: Callable[..., Array], ctx: Context, node: Node, *operands: Operand) -> Operand:
    return elementwise(function, *operands)


_register(_UNARY)
_register(_BINARY)


@lowering("pointwise")
def _pointwise(ctx: Context, node: Node, x: Operand) -> Operand:
    formula = parse_formula(PointwiseAttrs.of_node(node).function)
    return elementwise(lambda v: evaluate(formula, v), x)


@lowering("scale")
def _scale(ctx: Context, node: Node, x: Operand) -> Operand:
    return elementwise(lambda v: v * jnp.asarray(ScaleAttrs.of_node(node).by, v.dtype), x)


@lowering("cast")
def _cast(ctx: Context, node: Node, x: Operand) -> Operand:
    dtype = DTYPES[CastAttrs.of_node(node).dtype]
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
def _select(ctx: Context, node: Node, condition: Operand, a: Operand, b: Operand) -> Operand:
    return elementwise(jnp.where, condition, a, b)


@lowering("mask")
def _mask(ctx: Context, node: Node, x: Operand, keep: Operand) -> Operand:
    fill = MaskAttrs.of_node(node).fill
    return elementwise(lambda v, k: jnp.where(k, v, number(fill, v.dtype)), x, keep)


@lowering("constant")
def _constant(ctx: Context, node: Node) -> Operand:
    attrs = ConstantAttrs.of_node(node)
    declared = DTYPES[attrs.dtype]
    dtype = ctx.dtype if declared.is_float else canonicalize_dtype(declared.numpy)
    return Named(number(attrs.value, dtype), ())


def number(value: float, dtype: DTypeLike) -> jax.Array:
    """Return a number in `dtype`; one that is finite stays so, as the nearest that there is.

    A bound such as −1e30 would be −∞ in float16, whose product with zero is NaN.
    """
    if jnp.issubdtype(dtype, jnp.floating) and isfinite(value):
        low, high = BY_TORCH[jnp.dtype(dtype).name].limits
        value = min(max(value, low), high)
    return jnp.asarray(value, dtype)


@lowering("broadcast")
def _broadcast(ctx: Context, node: Node, x: Operand, like: Operand) -> Operand:
    def widened(a: Array, b: Array) -> Array:
        return jnp.broadcast_to(a.astype(_broadcast_type(a, b, ctx)), b.shape)

    return elementwise(widened, x, like)


def _broadcast_type(a: Array, b: Array, ctx: Context) -> DTypeLike:
    """Return the type of `a` broadcast over `b`: as wide as `b`, and not narrow where it counts.

    A 1 for each choice is summed to a count, which a narrow type would round.
    """
    if not jnp.issubdtype(a.dtype, jnp.floating):
        return a.dtype
    is_float = jnp.issubdtype(b.dtype, jnp.floating)
    return jnp.promote_types(a.dtype, b.dtype if is_float else accumulator(ctx.dtype))
