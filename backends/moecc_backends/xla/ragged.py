"""Products of sorted rows by `lax.ragged_dot`, and where XLA has a kernel for it.

Where it has none it masks the rows once for each expert and multiplies them all: as much
arithmetic and memory as experts, which is right and slow.
"""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moecc_backends.xla.dtypes import accumulator
from moecc_backends.xla.unused_rows import with_masked_gradient, zeroed

_LEAST_JAXLIB = (0, 11)
_LEAST_CUDNN = 92200
_LEAST_CAPABILITY = 8.0


def ragged_matmul(
    rows: jax.Array,
    weights: jax.Array,
    group_sizes: jax.Array,
    is_used: jax.Array | None,
    contracting_axis: int,
    kind: Any = None,
) -> jax.Array:
    """Multiply the rows ``[rows, a]`` of each group with the weights of its expert.

    `weights` is ``[experts, a, b]`` with ``contracting_axis=1`` or ``[experts, b, a]`` with
    ``contracting_axis=2``.  Rows beyond the last group, of which accelerators make anything, are
    where `is_used` (bool ``[rows]``, None if all are) is false: they are zeroed on the way in and
    on the way out, in values and gradients.  Products are asked for in `kind`, float32 at least by
    default; a kernel writes them as such, and the gradients have that type, too.
    """
    if contracting_axis == 2:
        weights = jnp.swapaxes(weights, 1, 2)
    if is_used is not None:
        rows = with_masked_gradient(zeroed(rows, is_used), is_used)
    wanted = kind or accumulator(rows.dtype)
    products = lax.ragged_dot(rows, weights, group_sizes, preferred_element_type=wanted)
    products = products.astype(rows.dtype)
    return products if is_used is None else zeroed(products, is_used)


def why_no_kernel(platform: str, dtype: jax.typing.DTypeLike) -> str | None:
    """Return why XLA would multiply every row with every expert on `platform`, or None.

    A GPU has a kernel with jaxlib 0.11, cuDNN 9.22, compute capability 8.0 and 16-bit elements;
    of a GPU that is not there nothing is known.
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
