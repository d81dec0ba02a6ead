"""Quantise and dequantise blocks, with the `gguf` package, imported when first needed."""

from __future__ import annotations

from typing import Any

import numpy as np

from moecc.checkpoint.gguf.engine import BY_ENGINE, quantised, quantize_chunk
from moecc.checkpoint.gguf.storage import Storage
from moecc.errors import MachineError
from moecc.support.extras import install_hint
from moecc.types.arrays import Array

# The package works row by row, slowly if rows are short.  Blocks are independent of rows, so they
# are passed in pieces of this many elements, whose temporary arrays stay in the cache.
_PIECE = 1 << 16


def dequantise(raw: Array, storage: Storage) -> Array:
    """Return the elements of whole blocks [bytes] as float32 [elements].

    Raises:
      MachineError: the `gguf` package is not installed.
    """
    quants, kind = _package(storage)
    piece_bytes = _PIECE // storage.block * storage.block_bytes
    values = np.empty(raw.size // storage.block_bytes * storage.block, np.float32)
    # A scale that is not finite gives values that are not finite, which the caller checks.
    with np.errstate(all="ignore"):
        for index, begin in enumerate(range(0, raw.size, piece_bytes)):
            piece = quants.dequantize(raw[begin : begin + piece_bytes], kind)
            values[index * _PIECE : index * _PIECE + piece.size] = piece
    return values


def quantise(values: Array, storage: Storage) -> Array:
    """Return float32 elements [..., n], n whole blocks, as blocks [bytes].

    Raises:
      MachineError: the package that makes them is not installed.
    """
    if storage.name in BY_ENGINE:
        return quantised(values, storage)
    quants, kind = _package(storage)
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    raw = np.empty(flat.size // storage.block * storage.block_bytes, np.uint8)
    piece_bytes = _PIECE // storage.block * storage.block_bytes
    # A block of zeros has the scale 0, by which the package divides.
    with np.errstate(all="ignore"):
        for index, begin in enumerate(range(0, flat.size, _PIECE)):
            piece = quants.quantize(flat[begin : begin + _PIECE], kind)
            raw[index * piece_bytes : index * piece_bytes + piece.size] = piece
    return raw


def require_package(storage: Storage) -> None:
    """Raise MachineError unless blocks of `storage` can be made and read."""
    _package(storage)
    if storage.name in BY_ENGINE:
        quantize_chunk(storage)


def _package(storage: Storage) -> tuple[Any, Any]:
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError as error:
        raise MachineError(
            f"weights in blocks ({storage.name}) need a package that is missing",
            found=str(error),
            hint=install_hint("gguf"),
        ) from None
    return quants, GGMLQuantizationType(storage.code)
