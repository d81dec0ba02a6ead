"""The checkpoint protocol; `moecc.formats.open` opens one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Protocol, Self

import numpy as np

from moecc.support.process import Closing
from moecc.support.untyped import Json
from moecc.types import DTYPES, Array, DType


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor on disk.

    Attributes:
      name: its name in the checkpoint.
      dtype: the type of the array that `Checkpoint.read` returns.
      shape: its sizes, outermost first.
      nbytes: its size in the file, in bytes.
      file: the file that holds it.
      offset: the offset of its first byte in that file.
      storage: the type on disk if it differs (``Q4_1``), otherwise empty.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int
    storage: str = ""


class Checkpoint(Protocol):
    """An opened checkpoint: metadata from headers, weights read on demand.

    Attributes:
      path: the folder or file that was opened.
      format: ``safetensors`` or ``gguf``.
      config: the content of config.json.
      tensors: the tensors, by name.
    """

    path: Path
    format: str
    config: dict[str, object]
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows [start, stop) of the first axis of a tensor; thread-safe.

        Raises:
          InputError: no such tensor, or its file was truncated, changed or replaced since opening.
          MachineError: the system cannot read it.
          ValueError: rows beyond the tensor.
        """
        ...

    def companions(self) -> dict[str, Path | bytes]:
        """Return the files that an export copies: tokenizer, generation config, licences."""
        ...

    def remarks(self) -> list[str]:
        """Return notes for readers of the result, such as that weights were quantised."""
        ...

    def card(self) -> dict[str, tuple[str, ...]]:
        """Return what is kept of the model's card: licence, language, data sets."""
        ...

    def files(self) -> list[Path]:
        """Return the weight files, the index and the config, for digests."""
        ...

    def require_unchanged(self) -> None:
        """Raise InputError if a file, companions included, changed since it was opened."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


# Parameters that someone hands over as a checkpoint, with the files of the source beside them.


class GivenParams(Closing):
    """Arrays in place of the tensors of a source; see `moecc.formats.source.Checkpoint`.

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
