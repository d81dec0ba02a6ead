"""The storage types of GGUF: plain, or blocks of quantised elements.

The numbers are those of `ggml_type` in ggml.h; sizes in bytes are those of the block structures
in ggml-common.h.  moecc supports the types that `gguf.quants` can dequantise and that dense
models are published in.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from moecc.errors import MachineError
from moecc.support.extras import install_hint
from moecc.types import BF16, F16, F32, Array, DType


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage type.

    Attributes:
      name: its name in ggml, ``Q4_1``.
      code: its number in the file.
      block: the elements of a block, along the innermost axis.
      block_bytes: the size of a block in bytes.
      dtype: the element type that a read returns.
    """

    name: str
    code: int
    block: int
    block_bytes: int
    dtype: DType

    @property
    def is_quantised(self) -> bool:
        """Whether a read has to dequantise blocks."""
        return self.block > 1


_ALL = (
    Storage("F32", 0, 1, 4, F32),
    Storage("F16", 1, 1, 2, F16),
    Storage("BF16", 30, 1, 2, BF16),
    Storage("Q8_0", 8, 32, 34, F32),
    Storage("Q4_0", 2, 32, 18, F32),
    Storage("Q4_1", 3, 32, 20, F32),
    Storage("Q5_0", 6, 32, 22, F32),
    Storage("Q5_1", 7, 32, 24, F32),
    Storage("Q4_K", 12, 256, 144, F32),
    Storage("Q5_K", 13, 256, 176, F32),
    Storage("Q6_K", 14, 256, 210, F32),
)

STORAGES: dict[int, Storage] = {storage.code: storage for storage in _ALL}
BY_NAME: dict[str, Storage] = {storage.name: storage for storage in _ALL}

FILE_NAME = "model.gguf"
"""The name of the file in a folder that moecc writes, and in its manifest."""

SUFFIX = ".gguf"

_NOT_READ = {
    4: "Q4_2",
    5: "Q4_3",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}


def storage_label(code: int) -> str:
    """Return the name of a storage type that moecc does not support."""
    name = _NOT_READ.get(code)
    return f"{name} (type {code})" if name else f"the unknown type {code}"


# Quantise to blocks that the `gguf` package cannot make, by the library of llama.cpp itself.
#
# `llama-cpp-py-sync` has it.  Its function ``ggml_quantize_chunk`` (ggml.h) is called on rows of
# one
# block, which are made each for itself; nothing else of the engine is loaded.

PACKAGE, DISTRIBUTION = "llama_cpp_py_sync", "llama-cpp-py-sync"
BY_ENGINE = ("Q4_K",)
"""The storage types that are made so."""


def quantised(values: Array, storage: Storage) -> Array:
    """Return float32 elements, whole blocks, as blocks [bytes].

    Raises:
      MachineError: the package is not installed, or its library cannot be used.
    """
    made = np.empty(values.size // storage.block * storage.block_bytes, np.uint8)
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    rows = flat.size // storage.block
    written = quantize_chunk(storage)(
        storage.code, flat.ctypes.data, made.ctypes.data, 0, rows, storage.block, None
    )
    if written != made.size:
        raise _unusable(storage, f"it wrote {written:,} bytes of {made.size:,}")
    return made


@cache
def quantize_chunk(storage: Storage) -> Any:
    """Return the function of the library. Raises as `quantised`."""
    found = find_spec(PACKAGE)
    places = [] if found is None else list(found.submodule_search_locations or ())
    files = [file for place in places for file in sorted(Path(place).glob("*ggml-base*"))]
    if not files:
        raise _unusable(storage, f"no {PACKAGE}")
    try:
        function = ctypes.CDLL(str(files[0])).ggml_quantize_chunk
    except (OSError, AttributeError) as error:
        raise _unusable(storage, str(error)) from None
    whole, address = ctypes.c_int64, ctypes.c_void_p
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, address, address, whole, whole, whole, address]
    return function


def _unusable(storage: Storage, found: str) -> MachineError:
    return MachineError(
        f"{storage.name} blocks are made by the library of llama.cpp", found=found,
        hint=f"pip install {DISTRIBUTION}; or --dtype q8_0, which moecc makes itself",
    )  # fmt: skip


# Quantise and dequantise blocks, with the `gguf` package, imported when first needed.

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
