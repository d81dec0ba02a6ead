"""Names for what jax has no type of, and the mesh axes that it tracks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

PyTree = Any
"""A pytree of arrays or of what stands for them (types, shardings, tracers): jax has no type."""

Function = Callable[..., PyTree]
"""A function of pytrees, which jax traces."""


def varies(array: jax.Array | jax.ShapeDtypeStruct) -> frozenset[str]:
    """Return the mesh axes along which `array` may differ from device to device."""
    # Only within shard_map has the type of an array this attribute.
    return getattr(jax.typeof(array), "manual_axis_type").varying  # noqa: B009


def manual_axes() -> frozenset[str]:
    """Return the mesh axes along which the program that is traced is that of one device."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


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
