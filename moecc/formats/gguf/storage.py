"""The storage types of GGUF: plain, or blocks of quantised elements.

The numbers are those of `ggml_type` in ggml.h; sizes in bytes are those of the block structures
in ggml-common.h.  moecc supports the types that `gguf.quants` can dequantise.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moecc.errors import MachineError
from moecc.support.lazy import np
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


FILE_NAME = "model.gguf"
"""The name of the file in a folder that moecc writes, and in its manifest."""

SUFFIX = ".gguf"

# Name, code, elements and bytes of a block, as the `gguf` package states them in
# GGML_QUANT_SIZES; the package is not imported to read a header.
STORAGES: dict[int, Storage] = {
    code: Storage(name, code, block, block_bytes, {"F16": F16, "BF16": BF16}.get(name, F32))
    for name, code, block, block_bytes in (
        ("F32", 0, 1, 4),
        ("F16", 1, 1, 2),
        ("BF16", 30, 1, 2),
        ("Q8_0", 8, 32, 34),
        ("Q4_0", 2, 32, 18),
        ("Q4_1", 3, 32, 20),
        ("Q5_0", 6, 32, 22),
        ("Q5_1", 7, 32, 24),
        ("Q2_K", 10, 256, 84),
        ("Q3_K", 11, 256, 110),
        ("Q4_K", 12, 256, 144),
        ("Q5_K", 13, 256, 176),
        ("Q6_K", 14, 256, 210),
        ("IQ1_S", 19, 256, 50),
        ("IQ1_M", 29, 256, 56),
        ("IQ2_XXS", 16, 256, 66),
        ("IQ2_XS", 17, 256, 74),
        ("IQ2_S", 22, 256, 82),
        ("IQ3_XXS", 18, 256, 98),
        ("IQ3_S", 21, 256, 110),
        ("IQ4_NL", 20, 32, 18),
        ("IQ4_XS", 23, 256, 136),
        ("TQ1_0", 34, 256, 54),
        ("TQ2_0", 35, 256, 66),
        ("MXFP4", 39, 32, 17),
        ("NVFP4", 40, 64, 36),
    )
}
DECAYS = Storage("F32", 0, 1, 4, F32)
"""Of logarithms of rates of decay: a file has the rates, negated."""

BY_NAME: dict[str, Storage] = {storage.name: storage for storage in STORAGES.values()}

_UNSUPPORTED = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64",
    28: "F64", 41: "Q1_0",
}  # fmt: skip


def storage_label(code: int) -> str:
    """Return the name of a storage type that moecc does not support."""
    name = _UNSUPPORTED.get(code)
    return f"{name} (type {code})" if name else f"the unknown type {code}"


# Quantise and dequantise blocks, with the `gguf` package, imported when first needed, or with the
# library of llama.cpp, which `llama-cpp-py-sync` has.  Its function ``ggml_quantize_chunk``
# (ggml.h) is called on rows of one block; nothing else of the engine is loaded.

ENGINE_PACKAGE, ENGINE_DISTRIBUTION = "llama_cpp_py_sync", "llama-cpp-py-sync"
BY_ENGINE = ("Q4_K",)
"""The storage types that the library makes, because the `gguf` package only reads them."""

# The package works row by row, slowly if rows are short.  Blocks are independent of rows, so they
# are passed in pieces of this many elements, whose temporary arrays stay in the cache.
_PIECE = 1 << 16


def dequantise(raw: Array, storage: Storage) -> Array:
    """Return the elements of blocks [bytes] as float32 [elements].

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
    """Return float32 elements [..., n], n a multiple of the block, as blocks [bytes].

    Raises:
      MachineError: the package that makes them is not installed, or its library fails.
    """
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    if storage is DECAYS:
        return np.asarray((-np.exp(flat.astype(np.float64))).astype(np.float32).view(np.uint8))
    raw = np.empty(flat.size // storage.block * storage.block_bytes, np.uint8)
    if storage.name in BY_ENGINE:
        rows = flat.size // storage.block
        written = quantize_chunk(storage)(
            storage.code, flat.ctypes.data, raw.ctypes.data, 0, rows, storage.block, None
        )
        if written != raw.size:
            raise _engine_error(storage, f"it wrote {written:,} bytes of {raw.size:,}")
        return raw
    quants, kind = _package(storage)
    piece_bytes = _PIECE // storage.block * storage.block_bytes
    # A block of zeros has the scale 0, by which the package divides.
    with np.errstate(all="ignore"):
        for index, begin in enumerate(range(0, flat.size, _PIECE)):
            piece = quants.quantize(flat[begin : begin + _PIECE], kind)
            raw[index * piece_bytes : index * piece_bytes + piece.size] = piece
    return raw


def logarithms(rates: Array) -> Array:
    """Return what `quantise` makes `DECAYS` of; what is no rate becomes NaN, or infinite."""
    with np.errstate(all="ignore"):
        return np.asarray(np.log(-rates.astype(np.float64)).astype(rates.dtype))


def require_package(storage: Storage) -> None:
    """Raise MachineError unless blocks of `storage` can be made and read."""
    _package(storage)
    if storage.name in BY_ENGINE:
        quantize_chunk(storage)


def _package(storage: Storage) -> tuple[Any, Any]:
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError as error:
        from moecc.support.extras import install_hint

        raise MachineError(
            f"weights in blocks ({storage.name}) need a package that is missing",
            found=str(error),
            hint=install_hint("gguf"),
        ) from None
    return quants, GGMLQuantizationType(storage.code)


@cache
def quantize_chunk(storage: Storage) -> Any:
    """Return the function of llama.cpp's library. Raises MachineError if there is none."""
    spec = find_spec(ENGINE_PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    files = [file for folder in folders for file in sorted(Path(folder).glob("*ggml-base*"))]
    if not files:
        raise _engine_error(storage, f"no {ENGINE_PACKAGE}")
    try:
        function = ctypes.CDLL(str(files[0])).ggml_quantize_chunk
    except (OSError, AttributeError) as error:
        raise _engine_error(storage, str(error)) from None
    size, address = ctypes.c_int64, ctypes.c_void_p
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, address, address, size, size, size, address]
    return function


def _engine_error(storage: Storage, reason: str) -> MachineError:
    return MachineError(
        f"{storage.name} blocks are made by the library of llama.cpp",
        found=reason,
        hint=f"python -m pip install {ENGINE_DISTRIBUTION}; or --dtype q8_0, made by moecc itself",
    )
