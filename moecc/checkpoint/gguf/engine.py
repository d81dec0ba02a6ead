"""Quantise to blocks that the `gguf` package cannot make, by the library of llama.cpp itself.

`llama-cpp-py-sync` has it.  Its function ``ggml_quantize_chunk`` (ggml.h) is called on rows of one
block, which are made each for itself; nothing else of the engine is loaded.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from moecc.checkpoint.gguf.storage import Storage
from moecc.errors import MachineError
from moecc.types.arrays import Array

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
