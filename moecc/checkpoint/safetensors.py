"""A strict reader of safetensors headers.

The format is eight bytes of length N, N bytes of JSON, and one buffer of data that the tensors
cover without gap or overlap (the README of the safetensors project is its specification).  The
usual parser is laxer: it accepts duplicate names, stray fields and unreadable shapes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path

from moecc.checkpoint.files import Identity, open_regular, read_into
from moecc.checkpoint.jsonfile import parse_json
from moecc.checkpoint.limits import MAX_SIZE, name_fault
from moecc.checkpoint.problems import Problems, describe, quoted
from moecc.checkpoint.sniff import SNIFFED_BYTES, sniff
from moecc.checkpoint.source import TensorInfo
from moecc.errors import InputError, nearest
from moecc.support.gc_pause import gc_paused
from moecc.support.text import amount
from moecc.types.dtypes import BY_SAFETENSORS, DType

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 1 << 18
MAX_RANK = 64
_LENGTH_BYTES = 8
# A header longer than this per tensor is an attack on the reader, not a header.
_FREE_HEADER_BYTES, _HEADER_BYTES_PER_TENSOR = 16 << 20, 512
_FREE_VALUES, _VALUES_PER_TENSOR = 1 << 20, 16
_FIELDS = {"dtype", "shape", "data_offsets"}
_SUB_BYTE = {"F4", "F6_E2M3", "F6_E3M2"}
_LONGEST_DTYPE = 20
_UNSUPPORTED = {"F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64"}


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header.

    Attributes:
      tensors: the tensors by name, in the order of the header.
      metadata: the strings under ``__metadata__``.
      data_start_bytes: the offset of the buffer in the file.
      identity: the state of the file when its header was read.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start_bytes: int
    identity: Identity


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; no tensor data is read.

    Raises:
      InputError: with all problems of the header.
      MachineError: the file cannot be read.
    """
    descriptor, identity = open_regular(path)
    try:
        raw = _read_raw(descriptor, identity.size_bytes, path)
    finally:
        os.close(descriptor)
    with gc_paused():
        return _Check(path, len(raw), identity).header(_parse(raw, path))


def _read_raw(descriptor: int, size_bytes: int, path: Path) -> bytearray:
    head = bytearray(min(SNIFFED_BYTES, size_bytes))
    read_into(descriptor, memoryview(head), 0, path)
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    if fault := _length_fault(length, bytes(head), size_bytes):
        raise _not_safetensors(path, bytes(head), *fault)
    raw = bytearray(length)
    read_into(descriptor, memoryview(raw), _LENGTH_BYTES, path)
    return raw


def _length_fault(length: int, head: bytes, size_bytes: int) -> tuple[str, str, str] | None:
    """Return the problem, the expected and the found value of a wrong start of a file, or None."""
    if size_bytes < _LENGTH_BYTES:
        return "the file is too small to have a header", "8 bytes or more", f"{size_bytes} bytes"
    if length > MAX_HEADER_BYTES:
        expected = f"at most {MAX_HEADER_BYTES:,} bytes of header"
        return "the header is too long", expected, f"{length:,} bytes"
    if length > size_bytes - _LENGTH_BYTES:
        found = f"{length:,} bytes of header in a file of {size_bytes:,} bytes"
        return "the header is longer than the file", "a header that ends in the file", found
    if length < 2:
        return "the header is too short", "2 bytes or more", f"{length} bytes"
    if head[_LENGTH_BYTES] != ord("{"):
        return "the header is not a JSON object", "'{'", f"byte 0x{head[_LENGTH_BYTES]:02x}"
    return None


def _not_safetensors(path: Path, head: bytes, what: str, expected: str, found: str) -> InputError:
    kind = sniff(head)
    if kind is None:
        hint = "the download may be incomplete; fetch the file again"
        return InputError(what, where=str(path), expected=expected, found=found, hint=hint)
    return InputError(
        "this is not a safetensors file",
        where=str(path),
        expected="the safetensors format, as the name says",
        found=kind.text,
        hint=kind.hint,
    )


def _parse(raw: bytearray, path: Path) -> dict[str, object]:
    tensors = raw.count(b'"data_offsets"')
    if tensors > MAX_TENSORS:
        raise InputError(
            "the header lists too many tensors",
            where=str(path),
            expected=f"at most {MAX_TENSORS:,}",
            found=f"{tensors:,}",
        )
    if len(raw) > _FREE_HEADER_BYTES + _HEADER_BYTES_PER_TENSOR * tensors:
        raise InputError(
            "the header is far too long for its number of tensors",
            where=str(path),
            found=f"{len(raw):,} bytes for {tensors:,} tensors",
        )
    max_values = _FREE_VALUES + _VALUES_PER_TENSOR * tensors
    entries = parse_json(raw, f"{path} (header)", max_values=max_values)
    assert isinstance(entries, dict)  # it begins with a brace
    return entries


@dataclass(frozen=True, slots=True)
class _Span:
    """The bytes [begin, end) of the buffer that a tensor claims."""

    begin: int
    end: int
    name: str


class _Check:
    """One pass over the entries of a header that collects every problem."""

    def __init__(self, path: Path, header_bytes: int, identity: Identity) -> None:
        self.path = path
        self.data_start = _LENGTH_BYTES + header_bytes
        self.identity = identity
        self.buffer_bytes = identity.size_bytes - self.data_start
        self.problems = Problems()
        self.spans: list[_Span] = []
        self.spans_complete = True

    def header(self, entries: dict[str, object]) -> Header:
        """Return the checked header, or raise with all its problems."""
        metadata = self._metadata(entries.pop("__metadata__", {}))
        tensors = {}
        for name, entry in entries.items():
            info = self._tensor(name, entry)
            if info is not None:
                tensors[name] = info
        self._layout()
        self.problems.raise_if_any()
        return Header(tensors, metadata, self.data_start, self.identity)

    def _add(
        self, name: str, what: str, expected: str | None, found: object, hint: str | None = None
    ) -> None:
        where = f"{self.path}, tensor {quoted(name)}"
        self.problems.add(what, where=where, expected=expected, found=describe(found), hint=hint)

    def _metadata(self, value: object) -> dict[str, str]:
        if not isinstance(value, dict):
            self._add("__metadata__", "the metadata is not an object", "an object", value)
            return {}
        for key, text in value.items():
            if not isinstance(text, str):
                what = f"the metadata {quoted(key)} is not a string"
                self._add("__metadata__", what, "a string", text)
        return value

    def _tensor(self, name: str, entry: object) -> TensorInfo | None:
        if fault := name_fault(name):
            self._add(name, fault, None, name)
        if type(entry) is not dict or entry.keys() != _FIELDS:
            self.spans_complete = False
            self._wrong_fields(name, entry)
            return None
        dtype = self._dtype(name, entry["dtype"])
        shape = self._shape(name, entry["shape"])
        span = self._span(name, entry["data_offsets"])
        if dtype is None or shape is None or span is None:
            return None
        nbytes = span.end - span.begin
        needed = prod(shape) * dtype.itemsize_bytes
        if nbytes != needed:
            what = "the shape and the offsets of the tensor contradict each other"
            expected = f"{needed:,} bytes for {dtype.safetensors} {list(shape)}"
            self.problems.add(
                what,
                where=f"{self.path}, tensor {quoted(name)}",
                expected=expected,
                found=f"{nbytes:,} bytes between the offsets {span.begin:,} and {span.end:,}",
            )
        offset = self.data_start + span.begin
        return TensorInfo(name, dtype, shape, nbytes, self.path, offset)

    def _wrong_fields(self, name: str, entry: object) -> None:
        expected = "an object with dtype, shape and data_offsets, and nothing else"
        if not isinstance(entry, dict):
            self._add(name, "the entry of the tensor is not an object", expected, entry)
            return
        missing = sorted(_FIELDS - entry.keys())
        extra = [quoted(key) for key in sorted(entry.keys() - _FIELDS)[:5]]
        found = [f"no {field}" for field in missing] + [f"an extra {key}" for key in extra]
        self.problems.add(
            "the entry of the tensor has the wrong fields",
            where=f"{self.path}, tensor {quoted(name)}",
            expected=expected,
            found=", ".join(found),
        )

    def _dtype(self, name: str, value: object) -> DType | None:
        dtype = BY_SAFETENSORS.get(value) if type(value) is str else None
        if dtype is not None:
            return dtype
        expected = f"one of {', '.join(BY_SAFETENSORS)}"
        word = value if type(value) is str and len(value) <= _LONGEST_DTYPE else ""
        if word in _SUB_BYTE:
            what = "moecc does not support types that pack several elements into a byte"
            self._add(name, what, expected, value, hint="use an unpacked copy of the model")
        elif word in _UNSUPPORTED:
            self._add(name, "moecc does not compute with this element type", expected, value)
        else:
            hint = nearest(word.upper(), BY_SAFETENSORS)
            self._add(name, "the element type is unknown", expected, value, hint=hint)
        return None

    def _shape(self, name: str, value: object) -> tuple[int, ...] | None:
        if type(value) is not list or len(value) > MAX_RANK or not _naturals(value):
            expected = f"a list of at most {MAX_RANK} whole numbers from 0 to 2^63 - 1"
            self._add(name, "the shape is not usable", expected, _first_odd(value))
            return None
        # Axes of size 0 are excluded: NumPy rejects [0, 2**62, 2**62] although it has no element.
        elements = prod(size for size in value if size)
        if elements > MAX_SIZE:
            expected = "fewer than 2^63 elements"
            self._add(name, "the shape has too many elements", expected, elements)
            return None
        return tuple(value)

    def _span(self, name: str, value: object) -> _Span | None:
        pair = value if type(value) is list and len(value) == 2 else []
        if not pair or not _naturals(pair) or pair[0] > pair[1]:
            self.spans_complete = False
            expected = "two whole numbers [begin, end], 0 <= begin <= end < 2^63"
            self._add(name, "the data offsets are not usable", expected, _first_odd(value))
            return None
        span = _Span(pair[0], pair[1], name)
        self.spans.append(span)
        return span

    def _layout(self) -> None:
        """Check that the tensors cover the buffer exactly once."""
        where = str(self.path)
        reach = _Span(0, 0, "")
        for span in sorted(self.spans, key=lambda span: (span.begin, span.end)):
            if span.begin < reach.end and span.end > span.begin:
                what = f"the data of {quoted(reach.name)} and {quoted(span.name)} overlap"
                found = f"bytes {reach.begin:,}-{reach.end:,} and {span.begin:,}-{span.end:,}"
                self.problems.add(what, where=where, found=found)
            elif span.begin > reach.end and self.spans_complete:
                after = f"of {quoted(reach.name)}" if reach.name else "of the header"
                what = f"a hole between the end {after} and the data of {quoted(span.name)}"
                self.problems.add(what, where=where, found=f"bytes {reach.end:,}-{span.begin:,}")
            if span.end > reach.end:
                reach = span
        self._end(reach)

    def _end(self, last: _Span) -> None:
        if last.end > self.buffer_bytes:
            beyond = [span for span in self.spans if span.end > self.buffer_bytes]
            first = min(beyond, key=lambda span: span.begin)
            self.problems.add(
                f"the file is cut short: the data of {amount(len(beyond), 'tensor')}, "
                f"the first of them {quoted(first.name)}, end beyond the end of the file",
                where=str(self.path),
                expected=f"a file of {describe(self.data_start + last.end)} bytes",
                found=f"{self.identity.size_bytes:,} bytes",
                hint="the download may be incomplete; fetch the file again",
            )
        elif last.end < self.buffer_bytes and self.spans_complete:
            after = f"the last tensor {quoted(last.name)}" if last.name else "the header"
            self.problems.add(
                f"{self.buffer_bytes - last.end:,} bytes after {after} belong to no tensor",
                where=str(self.path),
                expected=f"a file of {self.data_start + last.end:,} bytes",
                found=f"{self.identity.size_bytes:,} bytes",
            )


def _naturals(values: list[object]) -> bool:
    # Not all(): a generator takes three times as long, on 200,000 short lists.
    for value in values:  # noqa: SIM110
        if type(value) is not int or not 0 <= value <= MAX_SIZE:
            return False
    return True


def _first_odd(value: object) -> object:
    """Return the first element of a list that is not a usable size, if any."""
    if type(value) is not list:
        return value
    return next((item for item in value if not _naturals([item])), value)
