"""Read zarr arrays, each in a folder or all in one database, through tensorstore."""

from __future__ import annotations

import os
import re
import resource
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Protocol

from moecc.errors import InputError, MachineError, Problem, Problems, describe, quoted
from moecc.formats.files import files_below, read_json_object
from moecc.formats.store import fetch
from moecc.support.extras import install_hint
from moecc.support.lazy import np
from moecc.support.untyped import JsonDict
from moecc.types import Array, Shape

_MISSING_CHUNK = re.compile(r"chunk \{([\d, ]*)\} .* is missing")
"""The error of tensorstore for a chunk that is not stored."""

_SMALL_CHUNK_BYTES = 64 << 20
"""A chunk of this size may be larger than its array: stores that grow have such."""


class ZarrArrays:
    """Reads arrays by name, any box at a time; thread-safe.

    tensorstore opens files itself, so that those of a store are brought to this machine: all of a
    database, and an array in a folder of its own when it is opened.

    Args:
      folder: what holds them.
      driver: ``zarr`` or ``zarr3``, the version of the format.
      is_database: whether they are in one database (OCDBT), or each in a folder of its own.
      omits_fill_values: whether chunks equal to the array's fill value were not stored, so that a
        chunk that is missing has that value; otherwise its data are lost.
      removed: what is wrong where an array cannot be read and `folder` is gone.

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
        removed: Problem | None = None,
    ) -> None:
        try:
            import tensorstore
        except ImportError:
            raise MachineError(
                "arrays of a JAX program need tensorstore",
                where=folder,
                hint=install_hint("train"),
            ) from None
        if is_database:
            fetch(folder)
        self._store, self._is_database = tensorstore, is_database
        self._folder, self._driver = folder, driver
        self._omits_fill_values, self._removed = omits_fill_values, removed
        self._base: JsonDict = {"driver": "file"}
        self._prefix = f"{os.path.abspath(folder)}/"  # tensorstore rejects ".." in a path
        if is_database:
            self._base = {"driver": "ocdbt", "base": {"driver": "file", "path": self._prefix}}
            self._prefix = ""
        # One context: the manifest of the database is read once, not for each array.
        self._context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 64 << 20}})
        self._open: JsonDict = {}
        self._lock = threading.Lock()

    def shape(self, key: str) -> Shape:
        """Return the sizes of an array. Raises InputError if there is none."""
        return tuple(self._array(key).shape)

    def dtype(self, key: str) -> np.dtype[Any]:
        """Return the element type of an array. Raises InputError if there is none."""
        dtype: np.dtype[Any] = np.dtype(self._array(key).dtype.numpy_dtype)
        return dtype

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
            "driver": self._driver,
            "kvstore": kvstore,
            "fill_missing_data_reads": self._omits_fill_values,
        }
        if not self._is_database:
            fetch(self._folder / key)
        try:
            array = self._store.open(spec, open=True, read=True, context=self._context).result()
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
                where=self._folder,
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
                where=self._folder,
                expected=f"at most {memory:,} bytes",
                found=f"{nbytes:,} bytes",
            )

    def _unreadable(self, key: str, error: Exception) -> InputError:
        if self._removed is not None and not self._folder.is_dir():
            return InputError([self._removed])
        if missing := _MISSING_CHUNK.search(str(error)):
            return InputError(
                f"the chunk {missing[1].replace(' ', '')} of the array {key!r} is missing",
                where=self._folder,
                hint="fetch the whole folder again",
            )
        reason = str(error).split("[", 1)[0].strip()
        return InputError(
            f"the array {key!r} cannot be read", where=self._folder, found=reason[:300]
        )


def _bytes(array: Any, shape: Sequence[int]) -> int:
    """Return the bytes of so many elements of an array."""
    return prod(shape) * int(np.dtype(array.dtype.numpy_dtype).itemsize)


def _memory_bytes() -> int:
    """Return the memory that this process may have at most."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return memory if limit == resource.RLIM_INFINITY else min(memory, limit)


# Find the folder of the arrays of a JAX checkpoint, in one of steps or of items.

METADATA = "_METADATA"
"""The file of Orbax that says what arrays there are."""
FILE = "checkpoint"
"""The file of T5X."""
ITEMS = ("items", "default", "state", "params", "model_params", "pytree")
"""The folders that programs keep the tree in, beside other items of a step."""
_STEP = "checkpoint_"


def find_tree(folder: Path) -> Path | None:
    """Return the folder of the arrays of a checkpoint of Orbax or T5X in `folder`, or None."""
    return _find_orbax(folder) or _find_t5x(folder)


def tree_folders(files: Collection[str], folders: Collection[str]) -> Collection[str]:
    """Return the subfolders in which `find_tree` finds a tree and its arrays.

    Args:
      files: the names of the files of a folder.
      folders: the names of its subfolders; of several steps the last one is returned.
    """
    if METADATA in files or FILE in files:
        return folders
    names = {name.removeprefix(_STEP): name for name in folders}
    steps = [number for number in names if number.isdecimal() and number.isascii()]
    last = [names[max(steps, key=int)]] if steps else []
    return [*(name for name in folders if name in ITEMS), *last]


def _find_orbax(folder: Path) -> Path | None:
    """Return the folder of the tree in a checkpoint, a step, or a folder of steps: its last."""
    names = {int(n): n for n in os.listdir(folder) if n.isdecimal() and n.isascii()}
    steps = (folder / names[number] for number in sorted(names, reverse=True))
    return next((tree for candidate in (folder, *steps) if (tree := _tree_in(candidate))), None)


def _tree_in(folder: Path) -> Path | None:
    candidates = (folder, *(folder / name for name in ITEMS))
    return next((candidate for candidate in candidates if (candidate / METADATA).is_file()), None)


def _find_t5x(folder: Path) -> Path | None:
    """Return the folder of a step, or the last one of a folder of steps."""
    if (folder / FILE).is_file():
        return folder
    names = [n for n in os.listdir(folder) if n.startswith(_STEP)]
    steps = {int(n[len(_STEP) :]): n for n in names if n[len(_STEP) :].isdecimal()}
    candidates = (folder / steps[number] for number in sorted(steps, reverse=True))
    return next((candidate for candidate in candidates if (candidate / FILE).is_file()), None)


# A tree of arrays, and tensors that are pieces of its arrays.

_MOMENTS = {"opt_state", "optimizer", "optimizer_state", "param_states", "mu", "nu", "v", "m"}
"""The names of an optimiser's state in a tree."""


TreePath = tuple[str, ...]


class ArrayReader(Protocol):
    """Reads arrays by name."""

    def shape(self, key: str) -> Shape:
        """Return the sizes of an array."""
        ...

    def dtype(self, key: str) -> np.dtype[Any]:
        """Return the element type of an array."""
        ...

    def read_box(self, key: str, box: Sequence[tuple[int, int]]) -> Array:
        """Return a box of an array, a range of each axis."""
        ...


@dataclass(frozen=True)
class Tree:
    """The arrays of a checkpoint of a JAX program.

    Attributes:
      format: ``orbax`` or ``t5x``.
      folder: what holds the arrays.
      keys: the array of each path in the tree, by path.
      arrays: reads them.
      files: the files that they are in.
    """

    format: str
    folder: Path
    keys: Mapping[TreePath, str]
    arrays: ArrayReader
    files: tuple[Path, ...]

    @cached_property
    def variables(self) -> dict[TreePath, str]:
        """The array of each variable: programs on NNX keep it below the path, as ``value``."""
        return {p[:-1] if p[1:] and p[-1] == "value" else p: key for p, key in self.keys.items()}

    def below(self, marks: Sequence[TreePath]) -> dict[TreePath, str]:
        """Return the arrays of the model: those beside the first path that ends in one of `marks`.

        Optimisers keep arrays of the same names, below words of theirs.
        """
        prefixes = [p[: -len(m)] for p in self.variables for m in marks if p[-len(m) :] == m]
        if not prefixes:
            return {}
        prefix = min(prefixes, key=lambda path: (not _MOMENTS.isdisjoint(path), len(path)))
        return {
            path[len(prefix) :]: key
            for path, key in self.variables.items()
            if path[: len(prefix)] == prefix
        }


@dataclass(frozen=True)
class ArrayPiece:
    """A tensor that is a piece of an array, as a matrix ``[rows, columns]`` or a vector.

    Attributes:
      key: the array.
      at: the place on axes that the piece has not, by axis: a layer, an expert.
      rows: the axes that become rows, the slowest first.
      columns: the axes that become columns; none of a vector.
      limit: how many rows there are, where the array has more, padding.
      halves: whether the last axis of the rows has rotary pairs beside each other, which the tensor
        has half of the axis apart.
      scale: what the elements are multiplied by, in float32.
    """

    key: str
    rows: tuple[int, ...]
    columns: tuple[int, ...] = ()
    at: Mapping[int, int] | None = None
    limit: int | None = None
    halves: bool = False
    scale: float = 1.0

    def of_layer(self, layer: int, axis: int = 1) -> ArrayPiece:
        """Return the piece of one layer, of an array that has an axis of layers besides."""

        def moved(old: int) -> int:
            return old + (old >= axis)

        at = {moved(old): index for old, index in (self.at or {}).items()}
        rows, columns = (tuple(map(moved, axes)) for axes in (self.rows, self.columns))
        return replace(self, rows=rows, columns=columns, at={**at, axis: layer})

    def shape(self, array: Sequence[int]) -> Shape:
        """Return the sizes of the tensor, of an array with these."""
        count = prod(array[axis] for axis in self.rows)
        count = count if self.limit is None else min(count, self.limit)
        return (count, prod(array[a] for a in self.columns)) if self.columns else (count,)

    def read(self, arrays: ArrayReader, start: int, stop: int) -> Array:
        """Return rows [start, stop)."""
        sizes = arrays.shape(self.key)
        # Rows of one index of the slowest axis are read together: those of a head.
        inner = prod(sizes[axis] for axis in self.rows[1:])
        first, last = start // inner, -(-stop // inner)
        box = [(0, size) for size in sizes]
        for axis, index in (self.at or {}).items():
            box[axis] = (index, index + 1)
        box[self.rows[0]] = (first, last)
        array = arrays.read_box(self.key, box)
        fixed = tuple((self.at or {}).keys())
        array = array.transpose(*self.rows, *self.columns, *fixed)
        if self.halves:
            array = _halves(array, len(self.rows) - 1)
        values = array.reshape((last - first) * inner, *self.shape(sizes)[1:])
        values = values[start - first * inner : stop - first * inner]
        if self.scale != 1.0:
            values = (values.astype(np.float32) * np.float32(self.scale)).astype(array.dtype)
        return np.ascontiguousarray(values)

    def write(self, array: Array, values: Array) -> None:
        """Write a tensor to its place in `array`, where `read` finds it."""
        axes, sizes = (*self.rows, *self.columns), array.shape
        if self.scale != 1.0:
            values = (values.astype(np.float32) / np.float32(self.scale)).astype(array.dtype)
        values = values.reshape([sizes[axis] for axis in axes])
        if self.halves:
            values = _pairs(values, len(self.rows) - 1)
        at = self.at or {}
        part = array[tuple(at.get(axis, slice(None)) for axis in range(array.ndim))]
        part.transpose([sorted(axes).index(axis) for axis in axes])[...] = values


NamedPieces = Iterator[tuple[str, ArrayPiece]]
"""Tensors with their names."""


def _halves(array: Array, axis: int) -> Array:
    """Return `array` with the even places along an axis before the odd ones."""
    order = np.r_[0 : array.shape[axis] : 2, 1 : array.shape[axis] : 2]
    turned: Array = np.take(array, order, axis)
    return turned


def _pairs(array: Array, axis: int) -> Array:
    """Return `array` with the places of its halves along an axis in turn: undoes `_halves`."""
    order = np.arange(array.shape[axis]).reshape(2, -1).T.reshape(-1)
    turned: Array = np.take(array, order, axis)
    return turned


# Open a tree that Orbax wrote: any of its four layouts of arrays.

_LARGEST_BYTES = 256 << 20
_ARRAYS = {"jax.Array", "np.ndarray"}


def open_orbax(folder: Path) -> Tree:
    """Open the tree in a folder with ``_METADATA``; no array is read.

    Raises:
      InputError: the metadata are not those of a tree; all problems.
      MachineError: tensorstore is missing.
    """
    path = folder / METADATA
    metadata = read_json_object(path, limit_bytes=_LARGEST_BYTES)
    entries, problems = metadata.get("tree_metadata"), Problems()
    if not isinstance(entries, dict):
        raise InputError(
            "not the metadata of a tree", where=path, expected="tree_metadata, an object"
        )
    keys = dict(_keys(entries, path, problems))
    problems.raise_if_any()
    is_database = metadata.get("use_ocdbt", (folder / "manifest.ocdbt").exists())
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    # Earlier versions of Orbax stored no chunks of zeros.  A database lists its chunks, so that an
    # incomplete download is an error there nonetheless; single files cannot be told from lost ones.
    omits = bool(is_database) and not metadata.get("store_array_data_equal_to_fill_value", False)
    arrays = ZarrArrays(folder, driver, is_database=bool(is_database), omits_fill_values=omits)
    return Tree("orbax", folder, keys, arrays, tuple(files_below(folder)))


def _keys(entries: JsonDict, path: Path, problems: Problems) -> Iterator[tuple[TreePath, str]]:
    """Yield the path of each array in the tree, and its name in the store."""
    for name, entry in entries.items():
        value = entry.get("value_metadata") if isinstance(entry, dict) else None
        kind = value.get("value_type") if isinstance(value, dict) else None
        parts = entry.get("key_metadata") if isinstance(entry, dict) else None
        words = [p.get("key") if isinstance(p, dict) else None for p in parts or ()]
        if kind not in _ARRAYS:
            continue
        if not words or not all(isinstance(word, str | int) for word in words):
            where = f"{path}, tree_metadata, {quoted(name)}"
            problems.add("not the path of an array", where=where, found=describe(parts))
            continue
        steps = tuple(str(word) for word in words)
        if any(not s or "/" in s or s in (".", "..") or "\0" in s for s in steps):
            where = f"{path}, tree_metadata, {quoted(name)}"
            problems.add("the name of an array leaves its folder", where=where)
            continue
        yield steps, ".".join(steps)
