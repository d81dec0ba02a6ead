"""Products of sorted rows by `lax.ragged_dot`, and where XLA has a kernel for it.

Where it has none it masks the rows once for each expert and multiplies them all: as much
arithmetic and memory as experts, which is right and slow.
"""

from __future__ import annotations

import re
from functools import partial
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from moecc_backends.xla.kernels.row_blocks import inside, zeros_after
from moecc_backends.xla.trace.dtypes import accumulator

Arrays = tuple[jax.Array, ...]

_BLOCK = 2048
"""Rows of a gradient at a time: enough work for a product to hide reading and writing its sum."""

_LEAST_JAXLIB = (0, 11)
_LEAST_CUDNN = 92200
_LEAST_CAPABILITY = 8.0


def ragged_matmul(
    rows: jax.Array,
    weights: jax.Array,
    group_sizes: jax.Array,
    contracting_axis: int,
    kind: DTypeLike | None = None,
) -> jax.Array:
    """Multiply the rows ``[rows, a]`` of each group with the weights of its expert.

    `weights` is ``[experts, a, b]`` with ``contracting_axis=1`` or ``[experts, b, a]`` with
    ``contracting_axis=2``.  Beyond the last group, accelerators make anything; what `rows` holds
    there reaches no other row and no gradient of the weights.  Products are asked for in `kind`,
    float32 at least by default; a kernel writes them as such, and gradients have that type, too.
    """
    if contracting_axis == 2:
        weights = jnp.swapaxes(weights, 1, 2)
    wanted = jnp.dtype(kind or accumulator(rows.dtype))
    return _products(rows, weights, group_sizes, wanted).astype(rows.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _products(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, kind: np.dtype[np.generic]
) -> jax.Array:
    return lax.ragged_dot(rows, weights, group_sizes, preferred_element_type=kind)


def _forward(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, kind: np.dtype[np.generic]
) -> tuple[jax.Array, Arrays]:
    return _products(rows, weights, group_sizes, kind), (rows, weights, group_sizes)


def _backward(
    kind: np.dtype[np.generic], residuals: Arrays, d_products: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    rows, weights, group_sizes = residuals
    narrow = d_products.astype(rows.dtype)
    d_rows = _products(narrow, jnp.swapaxes(weights, 1, 2), group_sizes, kind)
    d_weights = _outer_products(rows, narrow, group_sizes)
    return d_rows.astype(rows.dtype), d_weights.astype(weights.dtype), None


_products.defvjp(_forward, _backward)


def _outer_products(rows: jax.Array, d_products: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Sum, for each group, the outer products of its rows and their cotangents.

    JAX's own derivative has a kernel nowhere: it multiplies all rows, once for each group.  Here a
    loop takes blocks of the rows that there are.  The sums run in float32 at least, one is stored:
    ``[groups, a, b]``, of the type of `rows`.
    """
    num_rows, kind = rows.shape[0], accumulator(rows.dtype)
    size = min(num_rows, _BLOCK)
    shape = rows.shape[1], d_products.shape[1]

    def of_group(run: Arrays) -> jax.Array:
        start, count = run

        def step(turn: jax.Array, total: jax.Array) -> jax.Array:
            # At the end of the array the block moves left, over rows that the mask leaves out.
            first = jnp.minimum(start + turn * size, num_rows - size)
            mask = inside(first, size, start + turn * size, start + count)
            left, right = (
                jnp.where(mask, lax.dynamic_slice_in_dim(x, first, size), 0)
                for x in (rows, d_products)
            )
            dimensions = (((0,), (0,)), ((), ()))
            return total + lax.dot_general(left, right, dimensions, preferred_element_type=kind)

        turns = (count + size - 1) // size
        total: jax.Array = lax.fori_loop(0, turns, step, zeros_after(d_products, shape, kind, 0))
        return total.astype(rows.dtype)

    summed: jax.Array = lax.map(of_group, (jnp.cumsum(group_sizes) - group_sizes, group_sizes))
    return summed


def why_no_kernel(platform: str, dtype: jax.typing.DTypeLike) -> str | None:
    """Return why XLA would multiply every row with every expert on `platform`, or None.

    A GPU has a kernel with jaxlib 0.11, cuDNN 9.22, compute capability 8.0 and 16-bit elements;
    of a GPU that is not attached nothing is known.
    """
    if platform == "tpu":
        return None
    if platform == "cpu":
        return "a CPU has no kernel for ragged_dot"
    if jnp.dtype(dtype).itemsize != 2:
        return "a GPU has a kernel for 16-bit elements only"
    installed = version("jaxlib")
    if tuple(map(int, installed.split(".")[:2])) < _LEAST_JAXLIB:
        return f"jaxlib {installed} has no kernel for a GPU, 0.11 has"
    return _why_not_this_gpu()


def _why_not_this_gpu() -> str | None:
    if jax.default_backend() != "gpu":
        return "no GPU is here to be asked"
    capability = float(getattr(jax.devices()[0], "compute_capability", 0))
    if capability < _LEAST_CAPABILITY:
        return f"compute capability {capability}, 8.0 is needed"
    version = getattr(jax.devices()[0].client, "platform_version", "")
    match = re.search(r"cudnn\D*(\d{5,6})", version, re.IGNORECASE)
    if match is None or int(match.group(1)) < _LEAST_CUDNN:
        return f"cuDNN 9.22 is needed, found {version.strip() or 'none'}"
    return None
