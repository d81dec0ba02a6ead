"""Open a Hugging Face folder: config.json, one safetensors file or shards with an index."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import MappingProxyType

from moecc.checkpoint.companions import find_companions
from moecc.checkpoint.files import (
    DescriptorPool,
    Identity,
    file_fault,
    identify,
    os_problem,
    require_unchanged,
)
from moecc.checkpoint.frontmatter import read_card
from moecc.checkpoint.index import compare_with_headers
from moecc.checkpoint.jsonfile import read_json_object
from moecc.checkpoint.layout import INDEX_NAME, choose_weights
from moecc.checkpoint.problems import Problems, quoted
from moecc.checkpoint.safetensors import Header, read_header
from moecc.checkpoint.source import TensorInfo
from moecc.errors import InputError, nearest
from moecc.support.closing import Closing
from moecc.types.arrays import Array

CONFIG_NAME = "config.json"
MAX_CONFIG_BYTES = 16 << 20


class SafetensorsFolder(Closing):
    """A checkpoint in a Hugging Face folder; see `moecc.checkpoint.source.Checkpoint`."""

    format = "safetensors"

    def __init__(
        self,
        path: Path,
        config: dict[str, object],
        headers: dict[Path, Header],
        companions: dict[str, Path],
        others: dict[Path, Identity] | None = None,
    ) -> None:
        self.path = path
        self.config = config
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {name: info for header in headers.values() for name, info in header.tensors.items()}
        )
        self._identities: dict[Path, Identity] = {
            file: header.identity for file, header in headers.items()
        }
        self._companions = companions
        self._others = others or {}
        self._pool = DescriptorPool()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows [start, stop) of the first axis of a tensor; thread-safe.

        Raises:
          InputError: no such tensor, its file was truncated, changed or replaced since opening,
            or a boolean is neither 0 nor 1.
          MachineError: the system cannot read it.
          ValueError: rows beyond the tensor.
        """
        info = self._info(name)
        import numpy as np  # headers are read without it

        shape, skipped = rows_of(info, start, stop)
        values = np.empty(shape, info.dtype.numpy)
        raw = values.reshape(-1).view(np.uint8)
        if raw.size:
            identity = self._identities[info.file]
            self._pool.read_into(info.file, identity, raw.data, info.offset + skipped)
        if info.dtype.kind == "bool" and raw.size and raw.max() > 1:
            raise InputError(
                "a boolean tensor has bytes other than 0 and 1",
                where=f"{info.file}, tensor {quoted(name)}",
                found=f"0x{int(raw.max()):02x}",
            )
        return values

    def companions(self) -> dict[str, Path | bytes]:
        """Return the files that an export copies byte for byte, by their name in the folder."""
        return dict(self._companions)

    def remarks(self) -> list[str]:
        """Return nothing: the folder is read without loss."""
        return []

    def card(self) -> dict[str, tuple[str, ...]]:
        """Return what is kept of the card in the folder."""
        return read_card(self.path)

    def files(self) -> list[Path]:
        """Return the weight files, the index if there is one, and the config."""
        metadata = [self.path / INDEX_NAME, self.path / CONFIG_NAME]
        return [*self._identities, *(path for path in metadata if path.exists())]

    def require_unchanged(self) -> None:
        """Raise InputError if a file, companions included, changed since it was opened."""
        require_unchanged(self._others | self._identities)

    def close(self) -> None:
        """Close the files."""
        self._pool.close()

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            # Comparing with every name of a large model would take seconds.
            similar = (known for known in self.tensors if abs(len(known) - len(name)) <= 4)
            hint = nearest(name, islice(similar, 2000))
            raise InputError(f"there is no tensor {quoted(name)}", where=str(self.path), hint=hint)
        return info


def rows_of(info: TensorInfo, start: int, stop: int | None) -> tuple[tuple[int, ...], int]:
    """Return the shape of rows [start, stop) of a tensor, and the number of bytes before them.

    Raises:
      ValueError: rows out of range, or rows of a tensor without axes.
    """
    if not info.shape:
        if start or stop is not None:
            raise ValueError(f"{info.name!r} has no axes, and therefore no rows")
        return (), 0
    rows = info.shape[0]
    stop = rows if stop is None else stop
    if not 0 <= start <= stop <= rows:
        raise ValueError(f"rows {start} to {stop} of {info.name!r}, which has {rows}")
    row_bytes = info.nbytes // rows if rows else 0
    return (stop - start, *info.shape[1:]), start * row_bytes


def open_folder(
    path: Path, *, with_weights: bool = True, needs_config: bool = True
) -> SafetensorsFolder:
    """Open a folder; config, index and all headers are checked, but no weight is read.

    Args:
      path: the folder.
      with_weights: whether weights are looked for; without, a config is enough.
      needs_config: whether it is an error if there is no config.

    Raises:
      InputError: with all problems of the folder.
      MachineError: the system denies access.
    """
    problems = Problems()
    names = _list(path)
    # Identified before they are read, so that no change in between goes unnoticed.
    others = _identify_all(path / name for name in (CONFIG_NAME, INDEX_NAME))
    reads_config = needs_config or os.path.lexists(path / CONFIG_NAME)
    config = _read_config(path, problems) if reads_config else {}
    index, shards = choose_weights(path, names, problems) if with_weights else (None, [])
    headers = _read_headers(path, shards, problems)
    if index is not None:
        compare_with_headers(index, headers, problems)
    companions = find_companions(path, problems)
    problems.raise_if_any()
    others |= _identify_all(companions.values())
    return SafetensorsFolder(path, config, headers, companions, others)


def _identify_all(paths: Iterable[Path]) -> dict[Path, Identity]:
    """Identify the files that exist; what is wrong with others is reported when they are read."""
    found = {}
    for path in paths:
        with suppress(InputError):
            found[path] = identify(path)
    return found


def _list(path: Path) -> set[str]:
    try:
        return set(os.listdir(path))
    except OSError as error:
        raise os_problem(error, path) from None


def _read_config(path: Path, problems: Problems) -> dict[str, object]:
    file = path / CONFIG_NAME
    if not os.path.lexists(file):
        hint = "it comes with the weights; moecc needs it to know the architecture"
        problems.add("the folder has no config.json", where=str(path), hint=hint)
        return {}
    if fault := file_fault(file, path):
        problems.extend((fault,))
        return {}
    try:
        return read_json_object(file, limit_bytes=MAX_CONFIG_BYTES)
    except InputError as error:
        problems.extend(error.problems)
        return {}


def _read_headers(path: Path, shards: list[str], problems: Problems) -> dict[Path, Header]:
    headers = {}
    for name in shards:
        file = path / name
        if not os.path.lexists(file):
            hint = "fetch it again, or fetch the whole model again"
            problems.add(f"the shard {quoted(name)} is missing", where=str(path), hint=hint)
            continue
        if fault := file_fault(file, path):
            problems.extend((fault,))
            continue
        try:
            headers[file] = read_header(file)
        except InputError as error:
            problems.extend(error.problems)
    return headers
