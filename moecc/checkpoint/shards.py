"""Assign tensors to safetensors files and offsets, and write the headers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from moecc.checkpoint.gguf.storage import Storage
from moecc.checkpoint.layout import SINGLE_NAME
from moecc.errors import InputError
from moecc.types.dtypes import DType

MAX_HEADER_BYTES = 100_000_000
"""The limit of the format's reference reader."""

_ALIGNMENT_BYTES = 8
_DIGITS = re.compile(r"([0-9]+)")


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its name, element type and shape, and its blocks if quantised."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    storage: Storage | None = None

    @property
    def nbytes(self) -> int:
        """The size of its data in bytes."""
        if self.storage is not None:
            return prod(self.shape) // self.storage.block * self.storage.block_bytes
        return prod(self.shape) * self.dtype.itemsize_bytes


@dataclass(frozen=True)
class Shard:
    """A file of tensors.

    Attributes:
      name: its name in the folder.
      header: the length and the padded header: everything before the data.
      offsets: the start of the data of each tensor in the file, by the tensor's name, in order.
      size_bytes: the size of the file.
    """

    name: str
    header: bytes
    offsets: Mapping[str, int]
    size_bytes: int


def plan_shards(
    entries: Sequence[Entry], max_shard_bytes: int, metadata: Mapping[str, str]
) -> list[Shard]:
    """Distribute tensors over files of at most `max_shard_bytes`, header included.

    Tensors are sorted by name, numbers compared as numbers, so that a layer is stored in one or
    two files; within a file the tensors with the largest elements come first, so that all are
    aligned.  A tensor larger than the limit gets a file of its own.

    Raises:
      InputError: a header would be too long for other readers.
    """
    groups: list[list[Entry]] = [[]]
    fixed = len(_header([], metadata)) + _ALIGNMENT_BYTES
    filled = fixed
    for entry in sorted(entries, key=lambda e: natural(e.name)):
        needed = entry.nbytes + _entry_bytes(entry)
        if groups[-1] and filled + needed > max_shard_bytes:
            groups.append([])
            filled = fixed
        groups[-1].append(entry)
        filled += needed
    count = len(groups)
    return [
        _shard(SINGLE_NAME if count == 1 else shard_name(i, count), group, metadata)
        for i, group in enumerate(groups, 1)
    ]


def shard_name(number: int, count: int) -> str:
    """Return the name of shard `number`, counted from 1, of `count`."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def index_json(shards: Sequence[Shard], total_bytes: int, parameters: int) -> bytes:
    """Return the content of the index of several shards."""
    weight_map = {name: shard.name for shard in shards for name in shard.offsets}
    ordered = {name: weight_map[name] for name in sorted(weight_map, key=natural)}
    metadata = {"total_size": total_bytes, "total_parameters": parameters}
    return (json.dumps({"metadata": metadata, "weight_map": ordered}, indent=2) + "\n").encode()


def natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """Return a key that sorts ``layers.2`` before ``layers.10``."""
    parts = _DIGITS.split(name)
    key = tuple((0, int(p)) if i % 2 else (1, p) for i, p in enumerate(parts))
    # Equal numbers with different leading zeros are different names.
    return (*key, (2, name))


def _shard(name: str, group: list[Entry], metadata: Mapping[str, str]) -> Shard:
    ordered = sorted(group, key=lambda e: (-e.dtype.itemsize_bytes, natural(e.name)))
    header = _header(ordered, metadata)
    if len(header) > MAX_HEADER_BYTES:
        raise InputError(
            f"the header of {name} is too long",
            expected=f"at most {MAX_HEADER_BYTES:,} bytes",
            found=f"{len(header):,} bytes for {len(group):,} tensors",
            hint="choose a smaller limit for a shard",
        )
    offsets: dict[str, int] = {}
    at = len(header)
    for entry in ordered:
        offsets[entry.name] = at
        at += entry.nbytes
    return Shard(name, header, offsets, at)


def _header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    content: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for entry in entries:
        content[entry.name] = {
            "dtype": entry.dtype.safetensors,
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.nbytes],
        }
        at += entry.nbytes
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def _entry_bytes(entry: Entry) -> int:
    """Return a lower bound on the bytes of a header entry, for any offsets."""
    name = len(json.dumps(entry.name, ensure_ascii=False).encode())
    fixed = len(',:{"dtype":"","shape":[],"data_offsets":[,]}') + 2 * 19
    return name + fixed + 8 + sum(len(str(size)) + 1 for size in entry.shape)
