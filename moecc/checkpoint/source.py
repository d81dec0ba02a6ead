"""What a checkpoint is to the rest of moecc, and how one is opened."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from moecc.checkpoint.files import os_problem
from moecc.checkpoint.sniff import sniff_file
from moecc.errors import InputError, nearest, printable
from moecc.ir.dtypes import DType


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
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
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


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a Hugging Face folder of safetensors, or a ``.gguf`` file.

    Everything is checked from headers and configs here; no weight is read.

    Raises:
      InputError: not a checkpoint, or a faulty one; all problems at once.
      MachineError: the system does not let us read it.
    """
    source = Path(path)
    try:
        mode = os.stat(source).st_mode
    except FileNotFoundError:
        raise _missing(source) from None
    except OSError as error:
        raise os_problem(error, source) from None
    except ValueError:
        raise InputError("the path is not usable", where=printable(str(source))) from None
    if stat.S_ISDIR(mode):
        from moecc.checkpoint.folder import open_folder

        return open_folder(source)
    return _open_file(source)


def _open_file(source: Path) -> Checkpoint:
    kind = sniff_file(source)
    if kind is not None and kind.name == "GGUF":
        from moecc.checkpoint.gguf import open_gguf

        return open_gguf(source)
    if source.suffix == ".gguf":
        found = kind.text if kind else "a file that does not begin with the letters GGUF"
        raise InputError("this is not a GGUF file", where=str(source), found=found)
    if kind is None and source.suffix in (".safetensors", ".json"):
        raise InputError(
            "a checkpoint is a folder, not one file of it",
            where=str(source),
            expected="the folder with config.json and the weights",
            hint=f"give {str(source.parent)!r} instead",
        )
    raise InputError(
        "this is not a checkpoint",
        where=str(source),
        expected="a folder with config.json and *.safetensors, or a .gguf file",
        found=kind.text if kind else "a file of a kind that moecc does not know",
        hint=kind.hint if kind else None,
    )


def _missing(source: Path) -> InputError:
    if os.path.lexists(source):
        return InputError("this is a symbolic link to nothing", where=str(source))
    parent = source.parent
    if parent.is_dir():
        neighbours = sorted(os.listdir(parent))[:10_000]
        hint = nearest(source.name, neighbours)
        return InputError("there is no such file or folder", where=str(source), hint=hint)
    looks_like_hub = len(source.parts) == 2 and not source.is_absolute()
    hint = "moecc reads local files: download the model first, then give the folder"
    return InputError(
        "there is no such file or folder",
        where=str(source),
        hint=hint if looks_like_hub else f"the folder {str(parent)!r} does not exist either",
    )
