"""Dequantise blocks to float32 with the `gguf` package, imported when first needed."""

from __future__ import annotations

import numpy as np

from moecc.checkpoint.gguf.storage import Storage
from moecc.errors import MachineError
from moecc.types.arrays import Array

# The package works row by row, slowly if rows are short.  Blocks are independent of rows, so they
# are passed in pieces of this many elements, whose temporary arrays stay in the cache.
_PIECE = 1 << 16


def dequantise(raw: Array, storage: Storage) -> Array:
    """Return the elements of whole blocks [bytes] as float32 [elements].

    Raises:
      MachineError: the `gguf` package is not installed.
    """
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError as error:
        raise MachineError(
            f"the weights are quantised ({storage.name}), and the package that dequantises them is "
            "missing",
            found=str(error),
            hint="pip install 'moecc[gguf]'",
        ) from None
    kind = GGMLQuantizationType(storage.code)
    piece_bytes = _PIECE // storage.block * storage.block_bytes
    values = np.empty(raw.size // storage.block_bytes * storage.block, np.float32)
    # A scale that is not finite gives values that are not finite, which the caller checks.
    with np.errstate(all="ignore"):
        for index, begin in enumerate(range(0, raw.size, piece_bytes)):
            piece = quants.dequantize(raw[begin : begin + piece_bytes], kind)
            values[index * _PIECE : index * _PIECE + piece.size] = piece
    return values
