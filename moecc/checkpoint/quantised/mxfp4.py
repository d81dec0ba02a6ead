"""MXFP4: floats of four bits, 32 of which share a power of two (OCP microscaling, version 1.0)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from moecc.checkpoint.problems import quoted
from moecc.checkpoint.quantised.packed import Packed, ReadRows, Stored
from moecc.types.arrays import Array

_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_HALF, *(-value for value in _HALF)], np.float32)
_BYTES = 16
_BIAS = 127


def find_mxfp4(stored: Stored) -> Iterator[Packed]:
    """Yield the matrices of experts ``[expert, in, out]``, stored as ``[expert, out, …]``."""
    for name, blocks in stored.ending("_blocks"):
        scales = stored.part(name + "_scales", blocks.shape[:-1], ("u8",))
        if len(blocks.shape) != 4 or blocks.shape[-1] != _BYTES or blocks.dtype.name != "u8":
            stored.problems.add(
                "not the blocks of experts",
                where=f"{blocks.file}, tensor {quoted(blocks.name)}",
                expected="[expert, out, block, 16] of u8",
                found=f"{list(blocks.shape)} of {blocks.dtype.name}",
            )
        elif scales is not None:
            experts, out, count, _ = blocks.shape
            parts = (blocks.name, scales.name)
            shape = (experts, count * 2 * _BYTES, out)
            yield Packed(name, shape, "MXFP4", parts, partial(_rows, parts, shape))


def _rows(
    parts: tuple[str, str], shape: tuple[int, ...], read: ReadRows, start: int, stop: int
) -> Array:
    values = np.empty((stop - start, *shape[1:]), np.float32)
    # The blocks of all experts together, unpacked, would be several times as large.
    for expert in range(start, stop):
        packed = read(parts[0], expert, expert + 1)[0]
        powers = read(parts[1], expert, expert + 1)[0].astype(np.int32) - _BIAS
        both = np.stack([_VALUES[packed & 15], _VALUES[packed >> 4]], axis=-1)
        scaled = np.ldexp(both.reshape(*packed.shape[:2], -1), powers[..., None])
        values[expert - start] = scaled.reshape(shape[2], shape[1]).T
    return values
