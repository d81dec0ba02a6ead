"""Read zarr arrays, each in a folder or all in one database, through tensorstore."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moecc.errors import InputError, MachineError
from moecc.support.extras import install_hint
from moecc.support.untyped import JsonDict
from moecc.types.arrays import Array


class ZarrArrays:
    """Reads arrays by name, any box at a time; thread-safe.

    Args:
      folder: what holds them.
      driver: ``zarr`` or ``zarr3``, the version of the format.
      is_database: whether they are in one database (OCDBT), or each in a folder of its own.

    Raises:
      MachineError: tensorstore is missing.
    """

    def __init__(self, folder: Path, driver: str = "zarr3", *, is_database: bool = True) -> None:
        try:
            import tensorstore
        except ImportError:
            raise MachineError(
                "arrays of a JAX program need tensorstore", where=str(folder),
                hint=install_hint("train"),
            ) from None  # fmt: skip
        self._store = tensorstore
        self._folder, self._driver = folder, driver
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
          InputError: there is no such array, or it cannot be read.
        """
        array = self._array(name)
        return self._read(name, array[start:stop] if array.rank else array)

    def read_box(self, key: str, box: Sequence[tuple[int, int]]) -> Array:
        """Return a box of an array, a range of each axis. Raises as `read`."""
        index = tuple(slice(start, stop) for start, stop in box)
        array = self._array(key)
        return self._read(key, array[index] if index else array)

    def _read(self, key: str, view: Any) -> Array:
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
        spec = {"driver": self._driver, "kvstore": kvstore}
        opening = self._store.open(spec, open=True, read=True, context=self._context)
        try:
            return opening.result()
        except (ValueError, OSError) as error:
            raise self._unreadable(key, error) from None

    def _unreadable(self, key: str, error: Exception) -> InputError:
        reason = str(error).split("[", 1)[0].strip()
        return InputError(
            f"the array {key!r} cannot be read", where=str(self._folder), found=reason[:300]
        )
