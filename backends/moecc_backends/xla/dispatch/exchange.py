"""Ragged rows exchanged between devices: to the experts that they chose, and back.

Each device has its rows sorted by expert, so what goes to a peer is one run.  A peer gets a run
from every device, and sorts the rows by expert again.  Both ways are the same partial one-to-one
map, so the derivative of one is the other, and nothing is scattered or counted again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from moecc_backends.xla.trace.values import varies

Mesh = tuple[str, ...]


class ExchangeMap(NamedTuple):
    """The map of one exchange, as one device knows it; i32 arrays.

    Attributes:
      there: offsets and sizes of what is sent and received on the way to the experts; None where
        as many rows go to each device.
      back: those of the way back.
      arrival_of_row: the arrival of each row, by expert, or −1.
      row_of_arrival: the row of each arrival, or −1.
      group_sizes: ``[experts]``, the rows of each of this device's experts.
    """

    there: RaggedArgs | None
    back: RaggedArgs | None
    arrival_of_row: Array
    row_of_arrival: Array
    group_sizes: Array


class RaggedArgs(NamedTuple):
    """Four of the operands of ``jax.lax.ragged_all_to_all``, each i32 ``[devices]``."""

    input_offsets: Array
    send_sizes: Array
    output_offsets: Array
    recv_sizes: Array


@dataclass(frozen=True)
class ExchangeSpec:
    """What does not change during an exchange.

    Attributes:
      mesh: the mesh axes along which devices exchange rows.
      rows: how many rows a device has before it.
      arrivals: how many it has room for after it.
      is_emulated: whether the platform has no ragged exchange.
      is_even: whether as many rows go to each device, those that are there first.
    """

    mesh: Mesh
    rows: int
    arrivals: int
    is_emulated: bool
    is_even: bool = False


def exchange_map(group_sizes: Array, mesh: Mesh, arrivals: int) -> ExchangeMap:
    """Return the map of an exchange along `mesh` of rows sorted by expert.

    Args:
      group_sizes: i32 ``[experts]``, the rows that this device has for each expert.
      mesh: the mesh axes; each device along them gets an equal run of the experts.
      arrivals: how many rows a device has room for.
    """
    sizes = lax.all_gather(group_sizes, mesh)
    device, devices = lax.axis_index(mesh), sizes.shape[0]
    by_device = sizes.reshape(devices, devices, -1).sum(2)
    sent, got = by_device[device], by_device[:, device]
    there = RaggedArgs(_starts(sent), sent, _starts(by_device, 0)[device], got)
    back = RaggedArgs(_starts(got), got, _starts(by_device, 1)[:, device], sent)
    count = sizes.shape[1] // devices
    parts = lax.dynamic_slice_in_dim(sizes, device * count, count, 1)
    arrived = _starts(parts.reshape(-1)).reshape(parts.shape)
    return _sorted_map(parts, arrived, arrivals, there, back)


def _sorted_map(
    parts: Array,
    arrived: Array,
    count: int,
    there: RaggedArgs | None = None,
    back: RaggedArgs | None = None,
) -> ExchangeMap:
    """Return the map of rows that arrive device by device, and are sorted by expert then.

    Args:
      parts: ``[devices, experts]``, the rows that come from each device for each expert.
      arrived: where the first of them arrives.
      count: the number of arrivals.
      there: what is sent to the experts, where devices get different numbers of rows.
      back: what is sent back.
    """
    by_expert = _starts(parts.T.reshape(-1)).reshape(parts.T.shape)
    return ExchangeMap(
        there,
        back,
        _matched(by_expert, arrived.T, parts.T, count),
        _matched(arrived, by_expert.T, parts, count),
        parts.sum(0),
    )


def round_map(sizes: Array, mesh: Mesh, first: Array, rows: int) -> ExchangeMap:
    """Return the map of the exchange of a round, in which any two devices exchange `rows` rows.

    Args:
      sizes: i32 ``[devices, experts]``, the rows that each device has for each expert.
      mesh: the mesh axes; each device along them gets an equal run of the experts.
      first: the first row of the round, of those for each device.
      rows: how many rows go to each device; those that are there come first.
    """
    devices, device = sizes.shape[0], lax.axis_index(mesh)
    runs = lax.dynamic_index_in_dim(sizes.reshape(devices, devices, -1), device, 1, False)
    ends = jnp.cumsum(runs, 1)
    starts, stops = (jnp.clip(at, first, first + rows) for at in (ends - runs, ends))
    parts = stops - starts
    arrived = _starts(parts, 1) + jnp.arange(devices, dtype=jnp.int32)[:, None] * rows
    return _sorted_map(parts, arrived, devices * rows)


def _starts(sizes: Array, axis: int = 0) -> Array:
    return jnp.cumsum(sizes, axis) - sizes


def _matched(mine: Array, theirs: Array, sizes: Array, count: int) -> Array:
    """Return for each of `count` rows in one order of runs its number in another, or −1 between.

    Args:
      mine: where each run begins in the one order; rising.
      theirs: where it begins in the other.
      sizes: how long it is.
      count: the number of rows.
    """
    starts, moved, lengths = (a.reshape(-1) for a in (mine, theirs, sizes))
    row = jnp.arange(count, dtype=jnp.int32)
    run = jnp.searchsorted(starts + lengths, row, side="right")
    bounded = jnp.minimum(run, starts.size - 1)
    is_there = (run < starts.size) & (row >= starts[bounded])
    return jnp.where(is_there, row - starts[bounded] + moved[bounded], -1).astype(jnp.int32)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def send(rows: Array, map: ExchangeMap, spec: ExchangeSpec) -> Array:
    """Bring rows ``[rows, width]`` to the devices of their experts: ``[arrivals, width]``.

    Rows that nothing arrives for are zero.
    """
    return _picked(_exchanged(rows, map.there, spec, spec.arrivals), map.arrival_of_row)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def send_back(rows: Array, map: ExchangeMap, spec: ExchangeSpec) -> Array:
    """Bring rows ``[arrivals, width]`` back to where `send` took them from: ``[rows, width]``."""
    return _exchanged(_picked(rows, map.row_of_arrival), map.back, spec, spec.rows)


send.defvjp(
    lambda rows, map, spec: (send(rows, map, spec), map),
    lambda spec, map, slope: (send_back(slope, map, spec), None),
)
send_back.defvjp(
    lambda rows, map, spec: (send_back(rows, map, spec), map),
    lambda spec, map, slope: (send(slope, map, spec), None),
)


def _picked(rows: Array, index: Array) -> Array:
    picked = jnp.take(rows, index, axis=0, mode="clip")
    return jnp.where((index >= 0)[:, None], picked, jnp.zeros((), rows.dtype))


def _exchanged(rows: Array, args: RaggedArgs | None, spec: ExchangeSpec, count: int) -> Array:
    if args is None:
        return lax.all_to_all(rows, spec.mesh, 0, 0, tiled=True)
    zeros = jnp.zeros((count, rows.shape[1]), rows.dtype)
    room = lax.pcast(zeros, tuple(sorted(varies(rows))), to="varying")
    exchange = emulated if spec.is_emulated else lax.ragged_all_to_all
    return exchange(rows, room, *args, axis_name=spec.mesh)


def emulated(
    operand: Array,
    output: Array,
    input_offsets: Array,
    send_sizes: Array,
    output_offsets: Array,
    recv_sizes: Array,
    *,
    axis_name: Mesh,
) -> Array:
    """Do as ``jax.lax.ragged_all_to_all``, which a CPU has not: gather all rows and pick.

    Every device sees the rows of all, so this tests a program and does not show its cost.
    """
    device = lax.axis_index(axis_name)
    every = lax.all_gather(operand, axis_name)
    starts, sizes, targets = (
        lax.all_gather(a, axis_name)[:, device] for a in (input_offsets, send_sizes, output_offsets)
    )
    row = jnp.arange(output.shape[0], dtype=jnp.int32)[:, None]
    is_there = (row >= targets) & (row < targets + sizes)
    sender = jnp.argmax(is_there, axis=1)
    source = row[:, 0] - targets[sender] + starts[sender]
    picked = every[sender, jnp.clip(source, 0, operand.shape[0] - 1)]
    return jnp.where(is_there.any(axis=1)[:, None], picked, output)
