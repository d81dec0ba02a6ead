"""A bounded reader of GGUF headers: nothing in the file is trusted before it is checked.

The format is a preamble (magic, version, two counts), metadata, one entry a tensor, padding, and
the data (docs/gguf.md of the ggml project is its specification).  The usual Python reader hangs
on a crafted file of 49 bytes and lets tensors overlap.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TypeAlias, overload

from moecc.errors import InputError, Problems, describe, printable, quoted
from moecc.formats.files import (
    MAX_SIZE,
    DataSpan,
    Identity,
    check_layout,
    name_fault,
    opened_regular,
    read_into,
)
from moecc.formats.gguf.storage import BY_NAME, STORAGES, Storage, storage_label
from moecc.formats.safetensors import Entry, Shard
from moecc.support.lazy import np
from moecc.types import Array, DType, Shape


@dataclass(frozen=True, slots=True)
class StoredValue:
    """A value as another file stores it: its type and its bytes."""

    data: bytes


Written: TypeAlias = "bool | int | float | str | Sequence[str] | Sequence[int] | Sequence[float]"
"""The types of a key's value: whole numbers become 32 bits, arrays have elements of one type."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key of the metadata with its value."""

    name: str
    value: Written | StoredValue


# Scan the header of a GGUF file, whose length is not stated anywhere.
#
# Every length in the file is a claim.  A claim is compared with the bytes that remain before
# anything is read or allocated for it, and data between two values are skipped by offset, so
# that memory is bounded by one window whatever a file claims.

MAX_HEADER_BYTES = 128 << 20
"""The largest headers of published models, those with 260,000 tokens, have 13 MB."""

MAX_STRINGS = 1 << 21
MAX_TEXT_BYTES = 16 << 20
WINDOW_BYTES = 1 << 20
_LENGTH = struct.Struct("<Q")
_CODE = struct.Struct("<I")


class Cursor:
    """An offset in a file, and a description of the part being read, for messages."""

    def __init__(self, descriptor: int, path: Path, size_bytes: int) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self.offset = 0
        self.reading = "the header"
        self._descriptor = descriptor
        self._end = min(size_bytes, MAX_HEADER_BYTES)
        self._window = b""
        self._window_start = 0
        self._strings = 0
        self._text_bytes = 0

    @property
    def left_bytes(self) -> int:
        """The bytes between the offset and the furthest end that a header may have."""
        return self._end - self.offset

    @property
    def where(self) -> str:
        """The file and the part being read."""
        return f"{self.path}, {self._part_text}"

    def number(self, layout: struct.Struct) -> int | float:
        """Read one number.

        Raises:
          InputError: the file ends before it.
        """
        begin = self._see(layout.size)
        self.offset += layout.size
        number: int | float = layout.unpack_from(self._window, begin)[0]
        return number

    def code(self) -> int:
        """Read a 32-bit code or small count. Raises as `number`."""
        return int(self.number(_CODE))

    def length(self) -> int:
        """Read a 64-bit length or count. Raises as `number`."""
        return int(self.number(_LENGTH))

    def text(self) -> str:
        """Read a string.

        Raises:
          InputError: it is longer than the rest of the file, too long to store, or not UTF-8.
        """
        count = self.length()
        self.require(count)
        self._text_bytes += count
        if self._text_bytes > MAX_TEXT_BYTES:
            raise self.error(
                "the strings of the header are too long",
                expected=f"at most {MAX_TEXT_BYTES:,} bytes of keys, names and single values",
                found=f"{self._text_bytes:,} bytes up to here",
            )
        begin = self._see(count)
        self.offset += count
        raw = self._window[begin : begin + count]
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = f"byte 0x{raw[error.start]:02x} at {self.offset - count + error.start:,}"
            raise self.error("a string is not UTF-8", found=byte) from None

    def skip(self, count: int) -> None:
        """Skip `count` bytes without reading them. Raises as `number`."""
        self.require(count)
        self.offset += count

    def skip_strings(self, count: int) -> None:
        """Skip `count` strings, reading only their lengths.

        Raises:
          InputError: they extend beyond the file, or are more than any header has.
        """
        self._strings += count
        if self._strings > MAX_STRINGS:
            raise self.error(
                "the header has too many strings",
                expected=f"at most {MAX_STRINGS:,}",
                found=f"{self._strings:,}",
            )
        while count:
            position = self._see(_LENGTH.size)
            window, last = self._window, len(self._window) - _LENGTH.size
            while count and position <= last:
                position += _LENGTH.size + _LENGTH.unpack_from(window, position)[0]
                count -= 1
            self.skip(self._window_start + position - self.offset)

    def require(self, count: int) -> None:
        """Reject a claim of `count` bytes that the file cannot hold. Raises InputError."""
        if count <= self.left_bytes:
            return
        if count <= self.size_bytes - self.offset:
            raise self.error(
                "the header is too long",
                expected=f"at most {MAX_HEADER_BYTES:,} bytes before the data",
                found=f"{count:,} more bytes at {self.offset:,}",
            )
        raise self.error(
            f"the file ends in the middle of {self._part_text}",
            expected=f"{count:,} more bytes",
            found=f"{self.size_bytes - self.offset:,} bytes",
            hint="the download may be incomplete; fetch the file again",
        )

    def error(
        self, fault: str, *, expected: str | None = None, found: str, hint: str | None = None
    ) -> InputError:
        """Return the error for the part being read."""
        return InputError(fault, where=self.where, expected=expected, found=found, hint=hint)

    @property
    def _part_text(self) -> str:
        # Truncated before it is escaped, because a name may be megabytes.
        return printable(self.reading[:300], 1000)

    def _see(self, count: int) -> int:
        """Load the next `count` bytes into the window; return their start in it."""
        begin = self.offset - self._window_start
        if begin >= 0 and begin + count <= len(self._window):
            return begin
        self.require(count)
        window = bytearray(min(max(WINDOW_BYTES, count), self.left_bytes))
        read_into(self._descriptor, memoryview(window), self.offset, self.path)
        self._window, self._window_start = bytes(window), self.offset
        return 0


# The metadata keys and values of a GGUF file; arrays are read from the file on demand.

MAX_KEYS = 1 << 14
_LEAST_KEY_BYTES = 8 + 1 + 4 + 1
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = range(4, 10)
_SCALARS: dict[int, tuple[str, str]] = {
    0: ("u8", "B"),
    1: ("i8", "b"),
    2: ("u16", "H"),
    3: ("i16", "h"),
    _U32: ("u32", "I"),
    _I32: ("i32", "i"),
    _F32: ("f32", "f"),
    _BOOL: ("bool", "B"),
    10: ("u64", "Q"),
    11: ("i64", "q"),
    12: ("f64", "d"),
}
_LAYOUTS = {code: struct.Struct(f"<{letter}") for code, (_, letter) in _SCALARS.items()}


@dataclass(frozen=True, slots=True)
class GgufArray:
    """An array stored in the file.

    Attributes:
      path: the file.
      identity: the state of the file when its header was read.
      kind: ``string`` or the name of a number, ``i32``.
      letter: NumPy's type code of the number, empty for strings.
      count: the number of elements.
      offset: the offset of its first byte.
      nbytes: its size in bytes.
    """

    path: Path
    identity: Identity
    kind: str
    letter: str
    count: int
    offset: int
    nbytes: int

    def strings(self) -> list[str]:
        """Read an array of strings.

        Raises:
          InputError: its elements are not strings, one is not UTF-8, or the file changed.
          MachineError: the file cannot be read.
        """
        if self.letter:
            raise self._wrong("strings")
        raw, texts, position = self._raw(), [], 0
        for index in range(self.count):
            length = int.from_bytes(raw[position : position + 8], "little")
            position += 8 + length
            try:
                texts.append(raw[position - length : position].decode("utf-8"))
            except UnicodeDecodeError:
                where = f"{self.path}, element {index:,} of an array"
                raise InputError("a string is not UTF-8", where=where) from None
        return texts

    def numbers(self) -> Array:
        """Read an array of numbers [count]. Raises as `strings`."""
        if not self.letter:
            raise self._wrong("numbers")
        return np.frombuffer(self._raw(), f"<{self.letter}")

    def _raw(self) -> bytes:
        with opened_regular(self.path) as (descriptor, identity):
            raw = bytearray(self.nbytes)
            read_into(descriptor, memoryview(raw), self.offset, self.path)
        if identity != self.identity:
            raise InputError("the file changed since its header was read", where=self.path)
        return bytes(raw)

    def _wrong(self, expected: str) -> InputError:
        fault = "an array of the metadata has elements of the wrong kind"
        return InputError(fault, where=self.path, expected=expected, found=self.kind)


Value: TypeAlias = int | float | bool | str | GgufArray
Metadata: TypeAlias = Mapping[str, Value]


Spans: TypeAlias = dict[str, tuple[int, int]]
"""The first and the last byte of the type and value of each key in the file."""


def read_metadata(
    cursor: Cursor, count: int, identity: Identity, problems: Problems, spans: Spans
) -> dict[str, Value]:
    """Read `count` keys with their values; duplicates and invalid values go to `problems`.

    `spans` receives the place of each value.

    Raises:
      InputError: the start of the next key is unknown.
    """
    if count > MAX_KEYS or count * _LEAST_KEY_BYTES > cursor.left_bytes:
        limit = min(MAX_KEYS, cursor.left_bytes // _LEAST_KEY_BYTES)
        expected = f"at most {limit:,} in a file of {cursor.size_bytes:,} bytes"
        raise cursor.error("too many metadata keys", expected=expected, found=f"{count:,}")
    metadata: dict[str, Value] = {}
    for index in range(count):
        cursor.reading = f"metadata key {index + 1:,} of {count:,}"
        key = cursor.text()
        cursor.reading = f"metadata key '{key}'"
        if fault := name_fault(key):
            problems.add(fault, where=cursor.where)
        elif key in metadata:
            problems.add("the key appears twice", where=cursor.where)
        begin = cursor.offset
        metadata[key] = _value(cursor, cursor.code(), identity, problems)
        spans[key] = (begin, cursor.offset)
    return metadata


def _value(cursor: Cursor, code: int, identity: Identity, problems: Problems) -> Value:
    if code == _STRING:
        return cursor.text()
    if code == _ARRAY:
        return _array(cursor, identity)
    if code not in _SCALARS:
        # Its size is unknown, so nothing after it can be located.
        raise cursor.error("unknown type of a value", expected="0 to 12", found=f"{code}")
    value = cursor.number(_LAYOUTS[code])
    if code == _BOOL:
        if value > 1:
            fault = "neither true nor false"
            problems.add(fault, where=cursor.where, expected="0 or 1", found=f"{value}")
        return bool(value)
    if code == _F32:
        # The shortest decimal that rounds to the same number: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(value)))
    return value


def _array(cursor: Cursor, identity: Identity) -> GgufArray:
    code = cursor.code()
    count = cursor.length()
    offset = cursor.offset
    if code == _STRING:
        cursor.skip_strings(count)
        kind, letter = "string", ""
    elif code in _SCALARS:
        cursor.skip(count * _LAYOUTS[code].size)
        kind, letter = _SCALARS[code]
    elif code == _ARRAY:
        nested = f"an array of {count:,} arrays"
        raise cursor.error("arrays of arrays are not read", expected="a flat array", found=nested)
    else:
        raise cursor.error("unknown type of an array", expected="0 to 12", found=f"{code}")
    nbytes = cursor.offset - offset
    return GgufArray(cursor.path, identity, kind, letter, count, offset, nbytes)


MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_TENSORS = 1 << 15
MAX_RANK = 4
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 16
_PREAMBLE_BYTES = 4 + 4 + 8 + 8
_LEAST_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8
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
    shape: Shape
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


def part_count(metadata: Metadata) -> int:
    """Return the number of files that the model is in, 1 where nothing is said."""
    count = metadata.get("split.count", 1)
    return count if type(count) is int else 1


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file; no tensor data is read.

    Raises:
      InputError: with all problems of the header.
      MachineError: the file cannot be read.
    """
    with opened_regular(path) as (descriptor, identity):
        return _GgufHeaderCheck(Cursor(descriptor, path, identity.size_bytes), identity).header()


class _GgufHeaderCheck:
    """One pass over a header that collects every problem."""

    def __init__(self, cursor: Cursor, identity: Identity) -> None:
        self.cursor = cursor
        self.path = cursor.path
        self.identity = identity
        self.problems = Problems()
        self.unsupported: dict[int, list[str]] = {}
        self.spans: Spans = {}

    def header(self) -> GgufHeader:
        """Return the checked header, or raise with all its problems."""
        cursor = self.cursor
        version = self._preamble()
        try:
            tensor_count, key_count = cursor.length(), cursor.length()
            metadata = read_metadata(cursor, key_count, self.identity, self.problems, self.spans)
            entries = self._entries(tensor_count, may_be_none=part_count(metadata) > 1)
        except InputError as error:
            self.problems.extend(error.problems)
            raise InputError(self.problems.listed()) from None
        self.alignment = self._alignment(metadata)
        data_start = -(-cursor.offset // self.alignment) * self.alignment
        tensors: dict[str, StoredTensor] = {}
        names: set[str] = set()
        for entry in entries:
            name = entry[0]
            if fault := name_fault(name):
                self._add(name, fault, None, describe(name))
            if name in names:
                self._add(name, "two tensors have this name", None, "a second entry")
            names.add(name)
            tensor = self._tensor(*entry, data_start)
            if tensor is not None:
                tensors[name] = tensor
        for code, unread in self.unsupported.items():
            self.problems.add(
                "moecc does not support this storage type",
                where=f"{self.path}, {len(unread):,} tensors, the first {quoted(unread[0])}",
                expected=f"one of {', '.join(storage.name for storage in STORAGES.values())}",
                found=storage_label(code),
                hint="take the same model in Q8_0, BF16 or F16",
            )
        spans = [DataSpan(t.offset, t.offset + t.nbytes, t.name) for t in tensors.values()]
        size = self.identity.size_bytes
        check_layout(spans, 0, size, self.path, self.problems, must_cover=False)
        self.problems.raise_if_any()
        return GgufHeader(
            self.path, version, metadata, tensors, data_start, self.identity, self.spans
        )

    def _preamble(self) -> int:
        cursor = self.cursor
        cursor.reading = "the preamble"
        cursor.require(_PREAMBLE_BYTES)
        magic = cursor.code().to_bytes(4, "little")
        if magic != MAGIC:
            older = _OLDER.get(magic)
            actual = f"the older {older} format" if older else f"the bytes {magic!r}"
            hint = "convert the original model with a current llama.cpp" if older else None
            raise cursor.error("this is not a GGUF file", expected="GGUF", found=actual, hint=hint)
        version = cursor.code()
        if version in VERSIONS:
            return version
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in VERSIONS:
            raise cursor.error(
                "the file is big-endian",
                expected="little-endian GGUF",
                found=f"version {swapped}, big-endian",
                hint="convert it: gguf-convert-endian FILE little, of the gguf package",
            )
        raise cursor.error(
            "this version of GGUF is not read",
            expected="version 2 or 3",
            found=f"version {version}",
            hint="convert the original model again, with a current llama.cpp",
        )

    def _entries(self, count: int, *, may_be_none: bool) -> list[tuple[str, Shape, int, int]]:
        """Read the name, sizes (innermost first), storage code and offset of each tensor."""
        cursor = self.cursor
        cursor.reading = "the list of tensors"
        if count > MAX_TENSORS or count * _LEAST_TENSOR_BYTES > cursor.left_bytes:
            limit = min(MAX_TENSORS, cursor.left_bytes // _LEAST_TENSOR_BYTES)
            expected = f"at most {limit:,} in a file of {cursor.size_bytes:,} bytes"
            raise cursor.error("too many tensors", expected=expected, found=f"{count:,}")
        if not count and not may_be_none:
            self.problems.add("the file has no tensors", where=self.path)
        entries = []
        for index in range(count):
            cursor.reading = f"tensor {index + 1:,} of {count:,}"
            name = cursor.text()
            cursor.reading = f"tensor '{name}'"
            rank = cursor.code()
            if not 1 <= rank <= MAX_RANK:
                # With a wrong rank the start of the next entry is unknown.
                raise cursor.error("wrong number of axes", expected="1 to 4", found=f"{rank:,}")
            sizes = tuple(cursor.length() for _ in range(rank))
            entries.append((name, sizes, cursor.code(), cursor.length()))
        return entries

    def _alignment(self, metadata: dict[str, Value]) -> int:
        value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(value) is int and 1 <= value <= MAX_ALIGNMENT and not value & (value - 1):
            return value
        self.problems.add(
            "the alignment of the data is not usable",
            where=f"{self.path}, metadata key 'general.alignment'",
            expected=f"a power of two up to {MAX_ALIGNMENT:,}",
            found=describe(value) if isinstance(value, int | str) else "another type",
        )
        return 1

    def _tensor(
        self, name: str, sizes: Shape, code: int, offset: int, data_start: int
    ) -> StoredTensor | None:
        storage = STORAGES.get(code)
        if storage is None:
            self.unsupported.setdefault(code, []).append(name)
        has_shape = self._check_shape(name, sizes, storage)
        if offset % self.alignment or offset > MAX_SIZE:
            expected = f"a multiple of {self.alignment}, below 2^63"
            self._add(name, "the offset is not usable", expected, f"{offset:,}")
        elif storage is not None and has_shape:
            nbytes = prod(sizes) // storage.block * storage.block_bytes
            return StoredTensor(name, self.path, storage, sizes[::-1], data_start + offset, nbytes)
        return None

    def _check_shape(self, name: str, sizes: Shape, storage: Storage | None) -> bool:
        shape_text = f"{list(sizes)}, innermost first"
        if min(sizes) < 1 or prod(sizes) > MAX_SIZE:
            expected = "sizes of at least 1, with a product below 2^63"
            self._add(name, "the shape is not usable", expected, shape_text)
        elif storage is not None and sizes[0] % storage.block:
            expected = (
                f"rows of a multiple of {storage.block} elements, the block of {storage.name}"
            )
            self._add(name, "the rows are not whole blocks", expected, shape_text)
        elif storage is not None and storage.is_quantised and len(sizes) == 1:
            expected = "a vector in F32, F16 or BF16"
            self._add(name, "a vector is quantised", expected, storage.name)
        else:
            return True
        return False

    def _add(self, name: str, fault: str, expected: str | None, actual: str) -> None:
        where = f"{self.path}, tensor {quoted(name)}"
        self.problems.add(fault, where=where, expected=expected, found=actual)


# Typed metadata values of a GGUF file; every problem is collected, not only the first.

MAX_LAYERS = 1 << 16
"""The longest array that is read for a key with one value per layer."""


class GgufKeys:
    """Reads the keys of one architecture, ``llama.block_count`` as ``block_count``."""

    def __init__(self, header: GgufHeader, problems: Problems) -> None:
        self.where = str(header.path)
        self.problems = problems
        self.used: set[str] = set()
        self._metadata = header.metadata
        self._prefix = f"{header.metadata['general.architecture']}."

    def refuse(
        self, key: str, fault: str, *, expected: str | None = None, hint: str | None = None
    ) -> None:
        """Record that the value of a key is rejected."""
        where = f"{self.where}, metadata key {self._prefix + key!r}"
        value = self._metadata.get(self._prefix + key)
        self.problems.add(fault, where=where, expected=expected, found=shown(value), hint=hint)

    def unused(self) -> list[str]:
        """Return the keys of the architecture that were never read."""
        keys = (key for key in self._metadata if key.startswith(self._prefix))
        return [name for key in keys if (name := key[len(self._prefix) :]) not in self.used]

    def value(self, key: str) -> Value | None:
        """Return a value, or None if it is missing; an array with equal layers is unwrapped."""
        value = self.array(key)
        return self._unwrapped(key, value) if isinstance(value, GgufArray) else value

    def array(self, key: str) -> Value | None:
        """Return a value as it is stored, an array included, or None if it is missing."""
        self.used.add(key)
        return self._metadata.get(self._prefix + key)

    def size(self, key: str, default: int | None = None) -> int:
        """Return a positive integer; without a default it is required."""
        stated = self.value(key)
        value = default if stated is None else stated
        if type(value) is int and value >= 1:
            return value
        fault = "the file does not state this size" if stated is None else "not a usable size"
        self.refuse(key, fault, expected="a whole number above 0")
        return default or 1

    @overload
    def number(self, key: str, default: float) -> float: ...

    @overload
    def number(self, key: str, default: None) -> float | None: ...

    def number(self, key: str, default: float | None) -> float | None:
        """Return a finite number of at least 0."""
        value = self.value(key)
        if value is None:
            return default
        if isinstance(value, int | float) and not isinstance(value, bool):
            number = float(value)
            if math.isfinite(number) and number >= 0:
                return number
        self.refuse(key, "not a usable number", expected="a finite number, 0 or above")
        return default

    def layers(self, key: str, count: int, default: int) -> list[int]:
        """Return a whole number for each of `count` layers, whether the file states one or all."""
        stated = self.array(key)
        value = default if stated is None else stated
        if isinstance(value, GgufArray) and value.letter and value.count == count <= MAX_LAYERS:
            numbers: list[int] = value.numbers().tolist()
        else:
            numbers = [value] * count if type(value) is int and count <= MAX_LAYERS else [-1]
        if all(type(number) is int and number >= 0 for number in numbers):
            return numbers
        self.refuse(key, "not usable", expected=f"whole numbers, one or {count:,}")
        return [default] * min(count, MAX_LAYERS)

    def text(self, key: str, default: str) -> str:
        """Return a string."""
        value = self.value(key)
        if value is None or isinstance(value, str):
            return default if value is None else value
        self.refuse(key, "not a string", expected="a string")
        return default

    def _unwrapped(self, key: str, array: GgufArray) -> Value | None:
        if array.letter and 1 <= array.count <= MAX_LAYERS:
            values = set(array.numbers().tolist())
            if len(values) == 1:
                value: Value = values.pop()
                return value
        self.refuse(key, "the layers differ", expected="the same value in each layer")
        return None


def shown(value: Value | None) -> str:
    """Describe a value of the metadata for a message."""
    if isinstance(value, GgufArray):
        return f"an array of {value.count:,} elements ({value.kind})"
    return "nothing" if value is None else describe(value)


def token_id(metadata: Metadata, name: str, count: int) -> int | None:
    """Return the id of a special token below `count`, or None if the file has none.

    Raises:
      InputError: the value is not such an id.
    """
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key)
    # The converter writes -1, as 2^32 - 1, if a tokenizer has no such token.
    if value is None or (type(value) is int and value in (-1, (1 << 32) - 1)):
        return None
    if type(value) is int and 0 <= value < count:
        return value
    expected = f"a token id below {count:,}"
    raise InputError("not a token id", where=key, expected=expected, found=shown(value))


# What is written before the data, by docs/gguf.md of the ggml project, version 3, little-endian.

VERSION = 3


def plan_file(name: str, entries: Sequence[Entry], keys: Sequence[Key]) -> Shard:
    """Return the file `name` of the tensors `entries`, in their order, each aligned.

    Raises:
      InputError: a tensor has more axes or another type than the format allows.
    """
    offsets, at = [], 0
    for entry in entries:
        at += -at % DEFAULT_ALIGNMENT
        offsets.append(at)
        at += entry.nbytes
    head = b"".join(
        (
            MAGIC,
            struct.pack("<IQQ", VERSION, len(entries), len(keys)),
            *(_text(key.name) + _encoded(key.value) for key in keys),
            *(_listed(entry, offset) for entry, offset in zip(entries, offsets, strict=True)),
        )
    )
    head += bytes(-len(head) % DEFAULT_ALIGNMENT)
    at += -at % DEFAULT_ALIGNMENT
    places = {e.name: len(head) + offset for e, offset in zip(entries, offsets, strict=True)}
    return Shard(name, head, places, len(head) + at)


def storage_of(dtype: DType) -> Storage | None:
    """Return the storage type of plain elements, or None if GGUF has none that moecc reads."""
    return BY_NAME.get(dtype.name.upper())


def _listed(entry: Entry, offset: int) -> bytes:
    storage = entry.storage or storage_of(entry.dtype)
    if storage is None or not 1 <= len(entry.shape) <= 4:
        raise InputError(
            "GGUF cannot store this tensor",
            where=entry.name,
            expected="one to four axes of F32, F16 or BF16",
            found=f"{entry.dtype} {list(entry.shape)}",
        )
    rank = len(entry.shape)
    sizes = struct.pack(f"<I{rank}Q", rank, *reversed(entry.shape))
    return _text(entry.name) + sizes + struct.pack("<IQ", storage.code, offset)


def _encoded(value: Written | StoredValue) -> bytes:
    if isinstance(value, StoredValue):
        return value.data
    if isinstance(value, bool | int | float | str):
        code, body = _scalar(value)
        return struct.pack("<I", code) + body
    items = [_scalar(item) for item in value]
    # An array of whole numbers is of signed ones, as the types of tokens are.
    code = {_U32: _I32}.get(items[0][0], items[0][0]) if items else _STRING
    head = struct.pack("<IIQ", _ARRAY, code, len(items))
    return head + b"".join(body for _, body in items)


def _scalar(value: float | str) -> tuple[int, bytes]:
    if isinstance(value, str):
        return _STRING, _text(value)
    if isinstance(value, bool):
        return _BOOL, struct.pack("<B", value)
    if isinstance(value, int):
        return _U32, struct.pack("<I", value)
    return _F32, struct.pack("<f", value)


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
