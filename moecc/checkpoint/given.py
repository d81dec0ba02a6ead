"""Parameters that someone hands over as a checkpoint, with the files of the source beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from moecc.checkpoint.source import Checkpoint, TensorInfo
from moecc.support.closing import Closing
from moecc.support.untyped import Json
from moecc.types.arrays import Array
from moecc.types.dtypes import DTYPES


class GivenParams(Closing):
    """Arrays in place of the tensors of a source; see `moecc.checkpoint.source.Checkpoint`.

    Args:
      source: the checkpoint that they began from.
      arrays: by name, of NumPy or of what NumPy can read.

    Attributes:
      source: as given.
    """

    format = "arrays"

    def __init__(self, source: Checkpoint, arrays: Json) -> None:
        self.source = source
        self.path = source.path
        self.config = source.config
        self._arrays = {name: np.asarray(array) for name, array in arrays.items()}
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {name: _info(name, array, source.path) for name, array in self._arrays.items()}
        )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows [start, stop) of the first axis of an array."""
        array = self._arrays[name]
        return array[start:stop] if array.ndim else array

    def companions(self) -> dict[str, Path | bytes]:
        """Return the files of the source that an export copies."""
        return self.source.companions()

    def remarks(self) -> list[str]:
        """Return that the parameters are not those of the source."""
        return ["the parameters were trained by a loop outside of moecc"]

    def card(self) -> dict[str, tuple[str, ...]]:
        """Return what is kept of the source's card."""
        return self.source.card()

    def files(self) -> list[Path]:
        """Return the files of the source."""
        return self.source.files()

    def require_unchanged(self) -> None:
        """Raise InputError if a file of the source changed since it was opened."""
        self.source.require_unchanged()

    def close(self) -> None:
        """Close nothing: the source is closed by who opened it."""


def _info(name: str, array: Array, path: Path) -> TensorInfo:
    dtype = next(d for d in DTYPES.values() if d.kind != "key" and d.numpy == array.dtype)
    return TensorInfo(name, dtype, array.shape, array.nbytes, path, 0)
