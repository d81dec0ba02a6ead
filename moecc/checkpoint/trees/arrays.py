"""Read zarr arrays, each in a folder or all in one database, through tensorstore."""

from __future__ import annotations

import os
import re
import resource
import threading
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from moecc.errors import InputError, MachineError
from moecc.support.extras import install_hint
from moecc.support.untyped import JsonDict
from moecc.types.arrays import Array

_MISSING_CHUNK = re.compile(r"chunk \{([\d, ]*)\} .* is missing")
"""What tensorstore says where a chunk is not stored."""

_SMALL_CHUNK_BYTES = 64 << 20
"""A chunk of this size may be larger than its array: stores that grow have such."""


class ZarrArrays:
    """Reads arrays by name, any box at a time; thread-safe.

    Args:
      folder: what holds them.
      driver: ``zarr`` or ``zarr3``, the version of the format.
      is_database: whether they are in one database (OCDBT), or each in a folder of its own.
      omits_fill_values: whether chunks equal to the array's fill value were not stored, so that a
        chunk that is missing has that value; otherwise its data are lost.

    Raises:
      MachineError: tensorstore is missing.
    """

    def __init__(
        self,
        folder: Path,
        driver: str = "zarr3",
        *,
        is_database: bool = True,
        omits_fill_values: bool = False,
    ) -> None:
        try:
            import tensorstore
        except ImportError:
            raise MachineError(
                "arrays of a JAX program need tensorstore", where=str(folder),
                hint=install_hint("train"),
            ) from None  # fmt: skip
        self._store = tensorstore
        self._folder, self._driver = folder, driver
        self._omits_fill_values = omits_fill_values
        self._base: JsonDict = {"driver": "file"}
        self._prefix = f"{folder}/"
        if is_database:
            self._base = {"driver": "ocdbt", "base": {"driver": "file", "path": self._prefix}}
            self._prefix = ""
        # One context: the manifest of the database is read once, not for each array.
        self._context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 64 << 20}})
        self._open: JsonDict = {}
        self._lock = threading.Lock()

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the sizes of an array. Raises InputError if there is none."""
        return tuple(self._array(key).shape)

    def dtype(self, key: str) -> np.dtype[Any]:
        """Return the element type of an array. Raises InputError if there is none."""
        found: np.dtype[Any] = np.dtype(self._array(key).dtype.numpy_dtype)
        return found

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows [start, stop) of the first axis of an array.

        Raises:
          InputError: there is no such array, a chunk of it is missing, or it cannot be read.
          MachineError: the rows do not fit into memory.
        """
        array = self._array(name)
        return self._read(name, array[start:stop] if array.rank else array)

    def read_box(self, key: str, box: Sequence[tuple[int, int]]) -> Array:
        """Return a box of an array, a range of each axis. Raises as `read`."""
        index = tuple(slice(start, stop) for start, stop in box)
        array = self._array(key)
        return self._read(key, array[index] if index else array)

    def _read(self, key: str, view: Any) -> Array:
        self._require_memory(key, _bytes(view, view.shape), "it")
        try:
            return np.asarray(view.read().result())
        except (ValueError, OSError) as error:
            raise self._unreadable(key, error) from None

    def _array(self, key: str) -> Any:
        with self._lock:
            if key not in self._open:
                self._open[key] = self._opened(key)
            return self._open[key]

    def _opened(self, key: str) -> Any:
        kvstore = {**self._base, "path": f"{self._prefix}{key}/"}
        spec = {
            "driver": self._driver, "kvstore": kvstore,
            "fill_missing_data_reads": self._omits_fill_values,
        }  # fmt: skip
        opening = self._store.open(spec, open=True, read=True, context=self._context)
        try:
            array = opening.result()
        except (ValueError, OSError) as error:
            raise self._unreadable(key, error) from None
        self._check_chunks(key, array)
        return array

    def _check_chunks(self, key: str, array: Any) -> None:
        """Reject chunks that no array of this shape needs: tensorstore decodes each in memory."""
        chunk = tuple(array.chunk_layout.read_chunk.shape or ())  # None: a scalar
        array_bytes, chunk_bytes = _bytes(array, array.shape), _bytes(array, chunk)
        if chunk_bytes > max(array_bytes, _SMALL_CHUNK_BYTES):
            raise InputError(
                f"the chunks of the array {key!r} are larger than the array",
                where=str(self._folder),
                expected=f"chunks of at most {list(array.shape)}, {array_bytes:,} bytes",
                found=f"chunks of {list(chunk)}, {chunk_bytes:,} bytes",
            )
        self._require_memory(key, chunk_bytes, "a chunk")

    def _require_memory(self, key: str, nbytes: int, part: str) -> None:
        # Where memory is refused to it, tensorstore ends the process.
        memory = _memory_bytes()
        if nbytes > memory:
            raise MachineError(
                f"the array {key!r} cannot be read: {part} does not fit into memory",
                where=str(self._folder), expected=f"at most {memory:,} bytes",
                found=f"{nbytes:,} bytes",
            )  # fmt: skip

    def _unreadable(self, key: str, error: Exception) -> InputError:
        if missing := _MISSING_CHUNK.search(str(error)):
            return InputError(
                f"the chunk {missing[1].replace(' ', '')} of the array {key!r} is missing",
                where=str(self._folder), hint="fetch the whole folder again",
            )  # fmt: skip
        reason = str(error).split("[", 1)[0].strip()
        return InputError(
            f"the array {key!r} cannot be read", where=str(self._folder), found=reason[:300]
        )


def _bytes(array: Any, shape: Sequence[int]) -> int:
    """Return the bytes of so many elements of an array."""
    return prod(shape) * np.dtype(array.dtype.numpy_dtype).itemsize


def _memory_bytes() -> int:
    """Return the memory that this process may have at most."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return memory if limit == resource.RLIM_INFINITY else min(memory, limit)
