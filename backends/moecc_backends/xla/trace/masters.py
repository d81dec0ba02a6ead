"""Parameters in a wider type than that of the computation, cast where they are used.

A loop over layers that is given them cast would have a copy of all of them for as long as it runs.
One that casts a layer a turn has none; but the gradient of a cast has the wider type, which would
take as much.  So the gradient leaves by an array of its own, in the narrower type, that nothing
reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np

from moecc.plan.tiles import in_tiles
from moecc_backends.xla.trace.typed_jax import laid_out


class Master(NamedTuple):
    """A parameter as it is stored.

    Attributes:
      stored: the parameter.
      slope: of its shape, in the type of the computation; its gradient is that of the parameter
        when it is cast, and its elements are never read.
    """

    stored: jax.Array
    slope: jax.Array

    def cast(self) -> jax.Array:
        """Return the parameter in the type of the computation."""
        return _cast(self.stored, self.slope)

    def as_stored(self, platform: str) -> Master:
        """Return it in the layout in which `platform` has it, whatever its readers would like.

        A compiler that gave a loop its parameters in another layout would copy those of all layers
        before the loop; so it changes the layout of one layer a turn.
        """
        order = stored_order(self.stored.shape, platform)
        return self._replace(stored=laid_out(self.stored, order))


def stored_order(shape: tuple[int, ...], platform: str) -> tuple[int, ...]:
    """Return the dimensions of a parameter as they are in memory, the last one fastest.

    A TPU has arrays in tiles, and of the last two dimensions that one last which pads less.
    """
    order = tuple(range(len(shape)))
    if platform != "tpu" or len(shape) < 2 or 1 in shape[-2:]:
        return order
    *rest, outer, inner = order
    is_turned = in_tiles(shape[-1], shape[-2]) < in_tiles(shape[-2], shape[-1])
    return (*rest, inner, outer) if is_turned else order


def cast_all(arrays: Iterable[jax.Array | Master]) -> tuple[jax.Array, ...]:
    """Return `arrays`, those that are stored in another type cast."""
    return tuple(a.cast() if isinstance(a, Master) else a for a in arrays)


@jax.custom_vjp
def _cast(stored: jax.Array, slope: jax.Array) -> jax.Array:
    # Rounding to its own precision changes nothing, but keeps the TPU compiler from casting the
    # whole parameter before the loop: it narrows what is only read to be cast (its pass
    # bfloat16-propagation), across a barrier, too.
    kind = np.finfo(stored.dtype)
    kept = jax.lax.reduce_precision(stored, kind.nexp, kind.nmant)
    return kept.astype(slope.dtype)


def _forward(stored: jax.Array, slope: jax.Array) -> tuple[jax.Array, None]:
    return _cast(stored, slope), None


def _backward(residuals: None, gradient: jax.Array) -> tuple[None, jax.Array]:
    return None, gradient


_cast.defvjp(_forward, _backward)
