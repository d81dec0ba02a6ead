"""What a checkpoint is to the rest of moecc; `moecc.checkpoint.open` opens one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from moecc.types.arrays import Array
from moecc.types.dtypes import DType


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor on disk.

    Attributes:
      name: its name in the checkpoint.
      dtype: the type of the array that `Checkpoint.read` returns.
      shape: its sizes, outermost first.
      nbytes: its size in the file, in bytes.
      file: the file that holds it.
      offset: where its first byte lies in that file.
      storage: the type on disk where that is another one (``Q4_1``), else empty.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int
    storage: str = ""


class Checkpoint(Protocol):
    """An opened checkpoint: everything known from headers, weights read on demand.

    Attributes:
      path: the folder or file that was opened.
      format: ``safetensors`` or ``gguf``.
      config: the content of config.json.
      tensors: what it holds, by name.
    """

    path: Path
    format: str
    config: dict[str, object]
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows [start, stop) of the first axis of a tensor; safe to call from threads.

        Raises:
          InputError: no such tensor, or its file was cut, changed or replaced since it was opened.
          MachineError: the system cannot read it.
          ValueError: rows beyond the tensor.
        """
        ...

    def companions(self) -> dict[str, Path | bytes]:
        """Return what an export copies byte for byte: tokenizer, generation config, licences."""
        ...

    def remarks(self) -> list[str]:
        """Return what a reader of the result should know, such as that weights were quantised."""
        ...

    def licence(self) -> dict[str, str]:
        """Return the licence keys of the model's card, where it states one."""
        ...

    def files(self) -> list[Path]:
        """Return the weight files, the index and the config, for digests."""
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
