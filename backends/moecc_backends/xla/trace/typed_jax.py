"""Functions of jax that have no annotations, with those that they are used by.

What a checker cannot know of jax is declared here: mypy lets this module alone call what has no
annotations (pyproject.toml).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend.random import threefry2x32_p
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

Axes = tuple[str, ...]
"""Names of mesh axes."""


PyTree = Any
"""A pytree of arrays or of what stands for them (types, shardings, tracers): jax has no type."""

Function = Callable[..., PyTree]
"""A function of pytrees, which jax traces."""

Devices = list[jax.Device]
"""Devices in the order of a mesh."""


named: Callable[[jax.Array, str], jax.Array] = checkpoint_name
"""Returns an array under a name by which a rematerialisation policy keeps it."""

barrier: Callable[[jax.Array], jax.Array] = jax.lax.optimization_barrier
"""Returns an array that the compiler makes before anything that reads it, and moves nowhere."""


def laid_out(array: jax.Array, order: tuple[int, ...]) -> jax.Array:
    """Return an array that the compiler has in memory by these dimensions, the last one fastest."""
    found: jax.Array = with_layout_constraint(array, Layout(order))
    return found


def psum(array: jax.Array, axes: Axes) -> jax.Array:
    """Return the sum over all devices along `axes`."""
    found: jax.Array = jax.lax.psum(array, axes)
    return found


def pmax(array: jax.Array, axes: Axes) -> jax.Array:
    """Return the largest over all devices along `axes`."""
    found: jax.Array = jax.lax.pmax(array, axes)
    return found


def psum_scatter(array: jax.Array, axes: Axes, at: int) -> jax.Array:
    """Return this device's shard, along dimension `at`, of the sum along `axes`."""
    found: jax.Array = jax.lax.psum_scatter(array, axes, scatter_dimension=at, tiled=True)
    return found


def all_to_all(array: jax.Array, axes: Axes, split: int, concat: int) -> jax.Array:
    """Return the array with dimension `split` cut and `concat` put together along `axes`."""
    found: jax.Array = jax.lax.all_to_all(
        array, axes, split_axis=split, concat_axis=concat, tiled=True
    )
    return found


def ragged_all_to_all(*operands: jax.Array, axes: str | Axes) -> jax.Array:
    """Return rows that were sent in runs of their own sizes; operands as jax documents them."""
    found: jax.Array = jax.lax.ragged_all_to_all(*operands, axis_name=axes)
    return found


def with_sharding(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Return `array`, which XLA's partitioner is to keep under `sharding`."""
    found: jax.Array = jax.lax.with_sharding_constraint(array, sharding)
    return found


def partition_spec(*parts: str | Axes | None) -> PartitionSpec:
    """Return the mesh axes that shard the dimensions of an array."""
    return PartitionSpec(*parts)


def abstract_array(
    shape: tuple[int, ...], dtype: DTypeLike, sharding: Sharding | None = None
) -> jax.ShapeDtypeStruct:
    """Return an array without its elements."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def varying_axes(array: jax.Array | jax.ShapeDtypeStruct) -> frozenset[str]:
    """Return the mesh axes along which the shards of `array` may differ."""
    # Only within shard_map has the type of an array this attribute.
    found: frozenset[str] = getattr(jax.typeof(array), "manual_axis_type").varying  # noqa: B009
    return found


def manual_axes() -> frozenset[str]:
    """Return the mesh axes along which the program that is traced is that of one device."""
    found: frozenset[str] = frozenset(jax.sharding.get_abstract_mesh().manual_axes)
    return found


def threefry(key: Iterable[jax.Array], counters: Iterable[jax.Array]) -> tuple[jax.Array, ...]:
    """Return the two words that threefry makes of two words of a key and two counters."""
    first, second = threefry2x32_p.bind(*key, *counters)
    return first, second


def wait_for(arrays: Iterable[jax.Array]) -> None:
    """Wait until `arrays` are computed."""
    jax.block_until_ready(list(arrays))


def configure(option: str, value: str | float) -> None:
    """Set an option of jax."""
    jax.config.update(option, value)


def unchecked(run: Function, *arrays: jax.Array) -> PyTree:
    """Return ``run(*arrays)``, where jax does not track what varies over the mesh."""
    if not manual_axes():
        return run(*arrays)
    within = jax.shard_map(
        run,
        in_specs=tuple(PartitionSpec() for _ in arrays),
        out_specs=PartitionSpec(),
        axis_names=frozenset(),
        check_vma=False,
    )
    return within(*arrays)
