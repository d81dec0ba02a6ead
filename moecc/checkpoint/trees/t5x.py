"""Open a checkpoint of T5X: one msgpack file, and a zarr array in a folder for each large one.

The file may state where an array is; that is never followed, because it may lead anywhere.  The
folder of an array has the name of its path in the tree (``checkpoints.py`` of t5x, version 3).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from moecc.checkpoint.problems import Problems, quoted
from moecc.checkpoint.trees.arrays import ZarrArrays
from moecc.checkpoint.trees.find import FILE
from moecc.checkpoint.trees.tree import Tree
from moecc.errors import InputError, MachineError, described
from moecc.support.extras import install_hint
from moecc.types.arrays import Array

_LARGEST_BYTES = 4 << 30
_ARRAY, _SCALAR = 1, 3
_CHUNKED = "__msgpack_chunked_array__"
_STORED = {"driver", "kvstore", "metadata"}
"""What says that an array is in a folder of its own."""
_TYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in (
        "float32", "float64", "float16", "bfloat16", "int8", "int16", "int32", "int64", "uint8",
        "uint16", "uint32", "uint64", "bool",
    )
}  # fmt: skip


def open_t5x(folder: Path) -> Tree:
    """Open a step; arrays that have folders of their own are not read.

    Raises:
      InputError: the file is not one of T5X; all problems.
      MachineError: msgpack or tensorstore is missing.
    """
    path, problems = folder / FILE, Problems()
    tree = _unpacked(path)
    root = tree.get("optimizer", tree) if isinstance(tree, dict) else None
    if not isinstance(root, dict):
        raise InputError("not a checkpoint of T5X", where=str(path), expected="a tree of arrays")
    inside: dict[str, Array] = {}
    keys: dict[tuple[str, ...], str] = {}
    for steps, leaf in _leaves(root, ()):
        name = ".".join(steps)
        if isinstance(leaf, dict):
            if not (folder / name / ".zarray").is_file() or "/" in name or name.startswith("."):
                where, hint = f"{folder}, {quoted(name)}", "fetch the whole folder again"
                problems.add("the folder of an array is missing", where=where, hint=hint)
        else:
            inside[name] = leaf
        keys[steps] = name
    problems.raise_if_any()
    stored = ZarrArrays(folder, "zarr", is_database=False)
    files = (Path(place) / n for place, _, names in os.walk(folder) for n in sorted(names))
    return Tree("t5x", folder, keys, T5xArrays(inside, stored), tuple(files))


class T5xArrays:
    """Reads arrays of the file, and those in folders; bfloat16 that is stored as integers too."""

    def __init__(self, inside: Mapping[str, Array], stored: ZarrArrays) -> None:
        self._inside, self._stored = inside, stored

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the sizes of an array."""
        return self._inside[key].shape if key in self._inside else self._stored.shape(key)

    def dtype(self, key: str) -> np.dtype[Any]:
        """Return the element type of an array."""
        found = self._inside[key].dtype if key in self._inside else self._stored.dtype(key)
        return _as_float(found)

    def read_box(self, key: str, box: Sequence[tuple[int, int]]) -> Array:
        """Return a box of an array, a range of each axis."""
        if key not in self._inside:
            found = self._stored.read_box(key, box)
        else:
            found = self._inside[key][tuple(slice(*bounds) for bounds in box)]
        return found.view(_as_float(found.dtype))


def _as_float(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return bfloat16 for uint16, as which version 2 and before stored it."""
    return np.dtype(ml_dtypes.bfloat16) if dtype == np.uint16 else dtype


def _leaves(tree: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the arrays of the tree, and the descriptions of those that are elsewhere."""
    if type(tree) is int and -(1 << 63) <= tree < 1 << 63:
        yield path, np.asarray(tree)
    elif isinstance(tree, np.ndarray) or (isinstance(tree, dict) and tree.keys() >= _STORED):
        yield path, tree
    elif isinstance(tree, dict) and len(path) < 64:
        for name, inner in tree.items():
            yield from _leaves(inner, (*path, str(name)))


def _unpacked(path: Path) -> Any:
    try:
        import msgpack
    except ImportError:
        raise MachineError(
            "a checkpoint of T5X needs msgpack", where=str(path), hint=install_hint("train")
        ) from None
    if path.stat().st_size > _LARGEST_BYTES:
        raise InputError("the file is too large for one of T5X", where=str(path))
    try:
        return msgpack.unpackb(
            path.read_bytes(), ext_hook=_extension, raw=False, strict_map_key=False,
            object_hook=_whole,
        )  # fmt: skip
    except InputError:
        raise
    except Exception as error:  # msgpack raises kinds of its own, and those of Python
        raise InputError(
            "not a msgpack file of T5X", where=str(path), found=described(error)
        ) from None


def _extension(code: int, data: bytes) -> object:
    """Return the array of an extension of flax; others are not read."""
    import msgpack

    if code not in (_ARRAY, _SCALAR):
        return None
    shape, name, raw = msgpack.unpackb(data, raw=False)
    dtype = _TYPES.get(name)
    sizes = [n for n in shape if type(n) is int and n >= 0]
    if dtype is None or len(sizes) != len(shape) or prod(sizes) * dtype.itemsize != len(raw):
        raise InputError("an array of the file does not have its size", found=f"{name} {shape}")
    return np.frombuffer(raw, dtype).reshape(sizes)


def _whole(found: dict[str, Any]) -> object:
    """Join an array that was too large for one entry."""
    if not found.get(_CHUNKED):
        return found
    shape, chunks = found["shape"], found["chunks"]
    order = sorted(chunks, key=int)
    sizes = [shape[k] for k in sorted(shape, key=int)]
    return np.concatenate([chunks[k] for k in order]).reshape(sizes)
