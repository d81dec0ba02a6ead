"""What a lowering needs to know of the mesh: the shard of an array that one device holds.

Under `shard_map` a graph is lowered for one device: arrays are shards, and sizes are those of
shards.  Most operations do to a shard what they do to the whole.  A few have to know more: the
number of shards, or where the local one begins.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import jax
import jax.numpy as jnp

from moecc.errors import InputError
from moecc.ir.graph import Node
from moecc.ir.local import local_attrs
from moecc.ir.mesh import Mesh
from moecc.ir.ops import Attrs
from moecc.types.tensor import Axis, TensorType
from moecc_backends.xla.trace.typed_jax import threefry, varying_axes

_MOST_ELEMENTS = 2**32


@dataclass(frozen=True)
class DeviceView:
    """The device of a mesh that a program is lowered for.

    Attributes:
      mesh: the mesh; None where arrays are whole.
      varied: arrays that vary over mesh axes, by the array that did not: each is made once, so
        that their gradients are added before they are reduced.
    """

    mesh: Mesh | None = None
    varied: dict[tuple[int, frozenset[str]], tuple[jax.Array, jax.Array]] = field(
        default_factory=dict
    )

    def shard_count(self, axis: Axis) -> int:
        """Return the number of shards of `axis`."""
        return 1 if self.mesh is None else self.mesh.size(axis.mesh)

    def shard_index(self, mesh: tuple[str, ...]) -> jax.Array | int:
        """Return which of the shards along the mesh axes `mesh` is the local one."""
        if self.mesh is None or self.mesh.size(mesh) == 1:
            return 0
        index: jax.Array = jax.lax.axis_index(mesh)
        return index

    def offset(self, axis: Axis, size: int) -> jax.Array | int:
        """Return where the local shard of `axis`, of `size` elements, begins."""
        return self.shard_index(axis.mesh) * size

    def attrs(self, node: Node) -> Attrs:
        """Return the attributes of `node` for the local shard: sizes and counts are local."""
        return node.attrs if self.mesh is None else local_attrs(node, self.mesh)

    def element_numbers(self, type: TensorType, shape: tuple[int, ...]) -> jax.Array | None:
        """Return the number of each element of a shard among those of the whole, row by row.

        None where the shard is the whole.

        Args:
          type: the type of the whole, its axes in the order in which elements are numbered.
          shape: the shape of the shard.

        Raises:
          InputError: the whole has more elements than 32 bits count; they would draw twice alike.
        """
        counts = [self.shard_count(a) for a in type.axes]
        if all(n == 1 for n in counts):
            return None
        if prod(shape) * prod(counts) > _MOST_ELEMENTS:
            raise InputError(
                "random numbers for more elements than 32 bits can count, on a mesh",
                expected=f"at most {_MOST_ELEMENTS:,}",
                found=f"{prod(shape) * prod(counts):,}",
                hint="noise on smaller values, or a smaller batch",
            )
        number = jnp.zeros(shape, jnp.uint32)
        for at, (axis, size) in enumerate(zip(type.axes, shape, strict=True)):
            along = jax.lax.broadcasted_iota(jnp.uint32, shape, at)
            start = jnp.asarray(self.offset(axis, size), jnp.uint32)
            number = number * jnp.uint32(size * self.shard_count(axis)) + start + along
        return number

    def varying(self, array: jax.Array, axes: frozenset[str]) -> jax.Array:
        """Return `array` as one that may differ along the mesh axes `axes`."""
        missing = axes - varies(array)
        if not missing or jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            return array
        key = (id(array), missing)
        if key not in self.varied:
            made = jax.lax.pcast(array, tuple(sorted(missing)), to="varying")
            # The array is kept with it, so that no other takes its id.
            self.varied[key] = (array, made)
        return self.varied[key][1]

    def settled(self, array: jax.Array, type: TensorType) -> jax.Array:
        """Return `array` as one that may differ wherever its `type` is sharded or unreduced."""
        if self.mesh is None:
            return array
        axes = {m for a in type.axes for m in a.mesh} | set(type.unreduced)
        return self.varying(array, frozenset(axes))


def varies(array: jax.Array) -> frozenset[str]:
    """Return the mesh axes along which `array` may differ from device to device."""
    return varying_axes(array)


def zeros_like_on_devices(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Return zeros that may differ along the mesh axes along which what has this shape does."""
    return DeviceView().varying(jnp.zeros(shape.shape, shape.dtype), varying_axes(shape))


def bits_at(key: jax.Array, numbers: jax.Array) -> jax.Array:
    """Return the 32 bits that ``jax.random.bits`` draws for the numbered elements of an array.

    They belong to key and number alone (threefry with counters, which jax calls partitionable).
    """
    words = jax.random.key_data(key).astype(jnp.uint32)
    key_words = (jnp.broadcast_to(w, numbers.shape) for w in words)
    counters = (jnp.zeros_like(numbers), numbers)
    first, second = threefry(key_words, counters)
    return first ^ second
