"""The checkpoint protocol; `moecc.formats.open` opens one."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from moecc.errors import InputError, nearest, quoted
from moecc.formats.files import Identity, require_unchanged
from moecc.formats.modelcard import CardEntries, read_card
from moecc.support.lazy import np
from moecc.support.process import Closing
from moecc.support.text import amount
from moecc.support.untyped import Json, JsonDict
from moecc.types import Array, DType, dtype_from_numpy


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


def tensor_info(tensors: Mapping[str, TensorInfo], name: str, path: Path) -> TensorInfo:
    """Return the tensor `name` of the checkpoint in `path`.

    Raises:
      InputError: there is none, with the nearest name.
    """
    info = tensors.get(name)
    if info is None:
        hint = nearest_tensor(tensors, name)
        raise InputError(f"there is no tensor {quoted(name)}", where=path, hint=hint)
    return info


def nearest_tensor(tensors: Collection[str], name: str) -> str | None:
    """Return a hint with the tensor whose name is most like `name`, or None."""
    # Comparing with every name of a large model would take seconds.
    similar = (tensor for tensor in tensors if abs(len(tensor) - len(name)) <= 4)
    return nearest(name, islice(similar, 2000))


FIRST, SECOND, ROW, COLUMN = "m", "v", "v_row", "v_col"
"""Kinds of moments: means of gradients, of squares, and of the squares of rows and of columns."""

Place = TypeVar("Place")


@dataclass(frozen=True)
class SavedMoments(Generic[Place]):
    """The moments of an optimiser.

    Attributes:
      optimizer: ``adamw`` or ``adafactor``.
      count: the updates that they are made of.
      of: where the moments are, by kind and name of the tensor.
    """

    optimizer: str
    count: int
    of: Mapping[str, Mapping[str, Place]]


class Checkpoint(Closing):
    """An opened checkpoint: metadata from headers, weights read on demand.

    Attributes:
      path: the folder or file that was opened.
      format: ``safetensors`` or ``gguf``.
      config: the content of config.json.
      tensors: the tensors, by name.
      states_tie: whether its config ties the output matrix although the model is read as untied.
      branches: the models of the same architecture beside it, by name.
    """

    path: Path
    format: str
    config: JsonDict
    tensors: Mapping[str, TensorInfo]
    states_tie: bool = False
    branches: Mapping[str, Checkpoint] = MappingProxyType({})
    _companions: Mapping[str, Path] = MappingProxyType({})
    _identities: Mapping[Path, Identity] = MappingProxyType({})

    @abstractmethod
    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows [start, stop) of the first axis of a tensor; thread-safe.

        Raises:
          InputError: no such tensor, or its file was truncated, changed or replaced since opening.
          MachineError: the system cannot read it.
          ValueError: rows beyond the tensor.
        """

    def companions(self) -> dict[str, Path | bytes]:
        """Return the files that an export copies: tokenizer, generation config, licences."""
        return dict(self._companions)

    def remarks(self) -> list[str]:
        """Return notes for readers of the result, such as that weights were quantised."""
        return []

    def card(self) -> CardEntries:
        """Return what is kept of the model's card: licence, language, data sets."""
        return read_card(self.path)

    @abstractmethod
    def files(self) -> list[Path]:
        """Return the weight files, the index and the config, for digests."""

    def named_files(self) -> dict[str, Path]:
        """Return the files by the names that a manifest has for them."""
        return {path.name: path for path in self.files()}

    def places(self) -> list[Path]:
        """Return the folders and files that an output must not touch."""
        return [self.path]

    def other_base(self) -> str | None:
        """Return the model that an adapter says it is of, where that is not called as its base."""
        return None

    def require_unchanged(self) -> None:
        """Raise InputError if a file, companions included, changed since it was opened."""
        require_unchanged(self._identities)

    def close(self) -> None:
        """Close the files."""


class DerivedCheckpoint(Checkpoint):
    """A checkpoint that reads its tensors from another one and has its files.

    Attributes:
      base: the other checkpoint.
    """

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        self.path = base.path
        self.config = base.config
        self.states_tie = base.states_tie

    def companions(self) -> dict[str, Path | bytes]:
        """Return the files of the base that an export copies, by their name in the folder."""
        return self.base.companions()

    def card(self) -> CardEntries:
        """Return what is kept of the base's card."""
        return self.base.card()

    def files(self) -> list[Path]:
        """Return the files of the base, for digests."""
        return self.base.files()

    def require_unchanged(self) -> None:
        """Raise InputError if a file of the base changed since it was opened."""
        self.base.require_unchanged()

    def close(self) -> None:
        """Close the files of the base."""
        self.base.close()


class GivenParams(DerivedCheckpoint):
    """Arrays in place of the tensors of a checkpoint, whose other files stand beside them.

    Args:
      base: the checkpoint that they began from.
      arrays: arrays of NumPy, or of what NumPy can read, by name.
    """

    format = "arrays"

    def __init__(self, base: Checkpoint, arrays: Json) -> None:
        super().__init__(base)
        self._arrays = {name: np.asarray(array) for name, array in arrays.items()}
        infos = {
            name: TensorInfo(
                name, element_type(array.dtype, name), array.shape, array.nbytes, base.path, 0
            )
            for name, array in self._arrays.items()
        }
        self.tensors = MappingProxyType(infos)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows [start, stop) of the first axis of an array."""
        array = self._arrays[name]
        return array[start:stop] if array.ndim else array

    def remarks(self) -> list[str]:
        """Return that the parameters are not those of the base."""
        return ["the parameters were trained by a loop outside of moecc"]

    def close(self) -> None:
        """Close nothing: the base is closed by who opened it."""


def element_type(numpy_type: np.dtype[Any], where: str) -> DType:
    """Return the type of elements that NumPy's type stands for. Raises InputError."""
    dtype = dtype_from_numpy(numpy_type)
    if dtype is None:
        message = "moecc does not know this type of elements"
        raise InputError(message, where=where, found=str(numpy_type))
    return dtype


def quantised_remark(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Return the remark that tensors were quantised, if any were, with the count of each kind."""
    kinds = Counter(info.storage for info in tensors.values() if info.storage).most_common()
    counts = ", ".join(f"{amount(count, 'tensor')} in {kind}" for kind, count in kinds)
    return [f"the weights were quantised, which lost precision: {counts}"] if kinds else []
