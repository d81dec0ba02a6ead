"""Open a tree that Orbax wrote: any of its four layouts of arrays."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from moecc.checkpoint.jsonfile import read_json_object
from moecc.checkpoint.problems import Problems, describe, quoted
from moecc.checkpoint.trees.arrays import ZarrArrays
from moecc.checkpoint.trees.find import METADATA
from moecc.checkpoint.trees.tree import Tree
from moecc.errors import InputError

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
            "not the metadata of a tree", where=str(path), expected="tree_metadata, an object"
        )
    keys = dict(_keys(entries, path, problems))
    problems.raise_if_any()
    is_database = metadata.get("use_ocdbt", (folder / "manifest.ocdbt").exists())
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    # Earlier versions of Orbax stored no chunks of zeros.  A database lists its chunks, so that an
    # incomplete download is an error there nonetheless; single files cannot be told from lost ones.
    omits = bool(is_database) and not metadata.get("store_array_data_equal_to_fill_value", False)
    arrays = ZarrArrays(folder, driver, is_database=bool(is_database), omits_fill_values=omits)
    return Tree("orbax", folder, keys, arrays, tuple(_files(folder)))


def _keys(
    entries: dict[str, object], path: Path, problems: Problems
) -> Iterator[tuple[tuple[str, ...], str]]:
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


def _files(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder):
        yield from (Path(place) / name for name in sorted(names))
