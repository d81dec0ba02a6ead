"""A bounded reader of GGUF headers: nothing in the file is trusted before it is checked.

The format is a preamble (magic, version, two counts), metadata, one entry a tensor, padding, and
the data (docs/gguf.md of the ggml project is its specification).  The usual Python reader hangs
on a crafted file of 49 bytes and lets tensors overlap.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import NoReturn

from moecc.checkpoint.files import Identity, open_regular
from moecc.checkpoint.gguf.cursor import Cursor
from moecc.checkpoint.gguf.metadata import Spans, Value, read_metadata
from moecc.checkpoint.gguf.storage import STORAGES, Storage, storage_label
from moecc.checkpoint.limits import MAX_SIZE, name_fault
from moecc.checkpoint.problems import Problems, describe, quoted
from moecc.errors import InputError
from moecc.support.text import amount

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_TENSORS = 1 << 15
MAX_RANK = 4
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 16
_PREAMBLE_BYTES = 4 + 4 + 8 + 8
_LEAST_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8
_U32 = struct.Struct("<I")
_OLDER = {b"lmgg": "ggml", b"fmgg": "ggmf", b"tjgg": "ggjt", b"algg": "ggla"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as stored in GGUF.

    Attributes:
      name: its name in GGUF.
      file: the file that it is in.
      storage: the storage type of its elements.
      shape: its sizes, outermost first.
      offset: the offset of its first byte in the file.
      nbytes: its size in the file, in bytes.
    """

    name: str
    file: Path
    storage: Storage
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """A checked header.

    Attributes:
      path: the file.
      version: the version of the format.
      metadata: keys and values, in file order.
      tensors: the tensors, by their GGUF names.
      data_start_bytes: the offset of the data in the file.
      identity: the state of the file when its header was read.
      spans: where the values of the metadata lie.
      parts: the states of the other files of a model in several.
    """

    path: Path
    version: int
    metadata: dict[str, Value]
    tensors: dict[str, StoredTensor]
    data_start_bytes: int
    identity: Identity
    spans: Spans
    parts: Mapping[Path, Identity] = field(default_factory=dict)

    @property
    def identities(self) -> dict[Path, Identity]:
        """The state of every file when its header was read."""
        return {self.path: self.identity, **self.parts}


def part_count(metadata: Mapping[str, Value]) -> int:
    """Return the number of files that the model is in, 1 where nothing is said."""
    count = metadata.get("split.count", 1)
    return count if type(count) is int else 1


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file; no tensor data is read.

    Raises:
      InputError: with all problems of the header.
      MachineError: the file cannot be read.
    """
    descriptor, identity = open_regular(path)
    try:
        return _Check(Cursor(descriptor, path, identity.size_bytes), identity).header()
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor's entry in the header, before it is checked."""

    name: str
    dimensions: tuple[int, ...]
    code: int
    offset: int


class _Check:
    """One pass over a header that collects every problem."""

    def __init__(self, cursor: Cursor, identity: Identity) -> None:
        self.cursor = cursor
        self.path = cursor.path
        self.identity = identity
        self.problems = Problems()
        self.unread: dict[int, list[str]] = {}
        self.spans: Spans = {}

    def header(self) -> GgufHeader:
        """Return the checked header, or raise with all its problems."""
        version = self._preamble()
        try:
            tensor_count, key_count = self.cursor.length(), self.cursor.length()
            metadata = read_metadata(
                self.cursor, key_count, self.identity, self.problems, self.spans
            )
            entries = self._entries(tensor_count, may_be_none=part_count(metadata) > 1)
        except InputError as error:
            self._give_up(error)
        data_start = self._data_start(metadata)
        tensors = self._tensors(entries, data_start)
        self._report_unread()
        self._layout(list(tensors.values()), data_start)
        self.problems.raise_if_any()
        return GgufHeader(
            self.path, version, metadata, tensors, data_start, self.identity, self.spans
        )

    def _give_up(self, error: InputError) -> NoReturn:
        self.problems.extend(error.problems)
        raise InputError(self.problems.listed()) from None

    def _preamble(self) -> int:
        cursor = self.cursor
        cursor.reading = "the preamble"
        cursor.require(_PREAMBLE_BYTES)
        magic = cursor.code().to_bytes(4, "little")
        if magic != MAGIC:
            older = _OLDER.get(magic)
            found = f"the older {older} format" if older else f"the bytes {magic!r}"
            hint = "convert the original model with a current llama.cpp" if older else None
            raise cursor.error("this is not a GGUF file", expected="GGUF", found=found, hint=hint)
        version = cursor.code()
        if version in VERSIONS:
            return version
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        big_endian = swapped in VERSIONS
        raise cursor.error(
            "the file is big-endian" if big_endian else "this version of GGUF is not read",
            expected="little-endian GGUF" if big_endian else "version 2 or 3",
            found=f"version {swapped}, big-endian" if big_endian else f"version {version}",
            hint="convert it: gguf-convert-endian FILE little, of the gguf package"
            if big_endian
            else "convert the original model again, with a current llama.cpp",
        )

    def _entries(self, count: int, *, may_be_none: bool) -> list[_Entry]:
        cursor = self.cursor
        cursor.reading = "the list of tensors"
        if count > MAX_TENSORS or count * _LEAST_TENSOR_BYTES > cursor.left_bytes:
            limit = min(MAX_TENSORS, cursor.left_bytes // _LEAST_TENSOR_BYTES)
            expected = f"at most {limit:,} in a file of {cursor.size_bytes:,} bytes"
            raise cursor.error("too many tensors", expected=expected, found=f"{count:,}")
        if not count and not may_be_none:
            self.problems.add("the file has no tensors", where=str(self.path))
        return [self._entry(index, count) for index in range(count)]

    def _entry(self, index: int, count: int) -> _Entry:
        cursor = self.cursor
        cursor.reading = f"tensor {index + 1:,} of {count:,}"
        name = cursor.text()
        cursor.reading = f"tensor '{name}'"
        rank = cursor.code()
        if not 1 <= rank <= MAX_RANK:
            # With a wrong rank the start of the next entry is unknown.
            raise cursor.error("wrong number of axes", expected="1 to 4", found=f"{rank:,}")
        dimensions = tuple(cursor.length() for _ in range(rank))
        return _Entry(name, dimensions, cursor.code(), cursor.length())

    def _data_start(self, metadata: dict[str, Value]) -> int:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        whole = type(alignment) is int and 1 <= alignment <= MAX_ALIGNMENT
        if not isinstance(alignment, int) or not whole or alignment & (alignment - 1):
            self.problems.add(
                "the alignment of the data is not usable",
                where=f"{self.path}, metadata key 'general.alignment'",
                expected=f"a power of two up to {MAX_ALIGNMENT:,}",
                found=describe(alignment) if isinstance(alignment, int | str) else "another type",
            )
            alignment = 1
        self.alignment = alignment
        return -(-self.cursor.offset // alignment) * alignment

    def _tensors(self, entries: list[_Entry], data_start: int) -> dict[str, StoredTensor]:
        tensors: dict[str, StoredTensor] = {}
        seen: set[str] = set()
        for entry in entries:
            if fault := name_fault(entry.name):
                self._add(entry, fault, None, describe(entry.name))
            if entry.name in seen:
                self._add(entry, "two tensors have this name", None, "a second entry")
            seen.add(entry.name)
            tensor = self._tensor(entry, data_start)
            if tensor is not None:
                tensors[entry.name] = tensor
        return tensors

    def _tensor(self, entry: _Entry, data_start: int) -> StoredTensor | None:
        storage = STORAGES.get(entry.code)
        if storage is None:
            self.unread.setdefault(entry.code, []).append(entry.name)
        shape = self._shape(entry, storage)
        if entry.offset % self.alignment or entry.offset > MAX_SIZE:
            expected = f"a multiple of {self.alignment}, below 2^63"
            self._add(entry, "the offset is not usable", expected, f"{entry.offset:,}")
        elif storage is not None and shape is not None:
            nbytes = prod(shape) // storage.block * storage.block_bytes
            offset = data_start + entry.offset
            return StoredTensor(entry.name, self.path, storage, shape, offset, nbytes)
        return None

    def _shape(self, entry: _Entry, storage: Storage | None) -> tuple[int, ...] | None:
        sizes = entry.dimensions
        found = f"{list(sizes)}, innermost first"
        if min(sizes) < 1 or prod(sizes) > MAX_SIZE:
            expected = "sizes of at least 1, with a product below 2^63"
            self._add(entry, "the shape is not usable", expected, found)
            return None
        if storage is not None and sizes[0] % storage.block:
            expected = (
                f"rows of a multiple of {storage.block} elements, the block of {storage.name}"
            )
            self._add(entry, "the rows are not whole blocks", expected, found)
            return None
        if storage is not None and storage.is_quantised and len(sizes) == 1:
            expected = "a vector in F32, F16 or BF16"
            self._add(entry, "a vector is quantised", expected, storage.name)
            return None
        return sizes[::-1]

    def _report_unread(self) -> None:
        for code, names in self.unread.items():
            self.problems.add(
                "moecc does not support this storage type",
                where=f"{self.path}, {len(names):,} tensors, the first {quoted(names[0])}",
                expected=f"one of {', '.join(storage.name for storage in STORAGES.values())}",
                found=storage_label(code),
                hint="take the same model in Q8_0, BF16 or F16",
            )

    def _layout(self, tensors: list[StoredTensor], data_start: int) -> None:
        """Check that the data of each tensor are inside the file and do not overlap."""
        size = self.identity.size_bytes
        reach: StoredTensor | None = None
        for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
            if reach is not None and tensor.offset < _end(reach):
                what = f"the data of {quoted(reach.name)} and {quoted(tensor.name)} overlap"
                spans = f"{reach.offset:,}-{_end(reach):,} and {tensor.offset:,}-{_end(tensor):,}"
                self.problems.add(what, where=str(self.path), found=f"bytes {spans}")
            if reach is None or _end(tensor) > _end(reach):
                reach = tensor
        if reach is None or _end(reach) <= size:
            return
        beyond = [tensor for tensor in tensors if _end(tensor) > size]
        first = min(beyond, key=lambda tensor: tensor.offset)
        self.problems.add(
            f"the data of {amount(len(beyond), 'tensor')}, the first of them {quoted(first.name)}, "
            "end beyond the end of the file",
            where=str(self.path),
            expected=f"a file of {_end(reach):,} bytes",
            found=f"{size:,} bytes",
            hint="the download may be incomplete; fetch the file again",
        )

    def _add(self, entry: _Entry, what: str, expected: str | None, found: str) -> None:
        where = f"{self.path}, tensor {quoted(entry.name)}"
        self.problems.add(what, where=where, expected=expected, found=found)


def _end(tensor: StoredTensor) -> int:
    return tensor.offset + tensor.nbytes
