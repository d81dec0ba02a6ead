"""The metadata keys and values of a GGUF file; arrays are read from the file on demand."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from moecc.checkpoint.files import Identity, open_regular, read_into
from moecc.checkpoint.gguf.cursor import Cursor
from moecc.checkpoint.limits import name_fault
from moecc.checkpoint.problems import Problems
from moecc.errors import InputError
from moecc.types.arrays import Array

MAX_KEYS = 1 << 14
_LEAST_KEY_BYTES = 8 + 1 + 4 + 1
_STRING, _ARRAY, _BOOL, _FLOAT32 = 8, 9, 7, 6
_SCALARS: dict[int, tuple[str, str]] = {
    0: ("u8", "B"),
    1: ("i8", "b"),
    2: ("u16", "H"),
    3: ("i16", "h"),
    4: ("u32", "I"),
    5: ("i32", "i"),
    _FLOAT32: ("f32", "f"),
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
        descriptor, identity = open_regular(self.path)
        try:
            raw = bytearray(self.nbytes)
            read_into(descriptor, memoryview(raw), self.offset, self.path)
        finally:
            os.close(descriptor)
        if identity != self.identity:
            raise InputError("the file changed since its header was read", where=str(self.path))
        return bytes(raw)

    def _wrong(self, expected: str) -> InputError:
        what = "an array of the metadata has elements of the wrong kind"
        return InputError(what, where=str(self.path), expected=expected, found=self.kind)


Value: TypeAlias = int | float | bool | str | GgufArray


Spans: TypeAlias = dict[str, tuple[int, int]]
"""Where the type and the value of each key lie in the file, from the first byte to the last."""


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
            what = "neither true nor false"
            problems.add(what, where=cursor.where, expected="0 or 1", found=f"{value}")
        return bool(value)
    if code == _FLOAT32:
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
        found = f"an array of {count:,} arrays"
        raise cursor.error("arrays of arrays are not read", expected="a flat array", found=found)
    else:
        raise cursor.error("unknown type of an array", expected="0 to 12", found=f"{code}")
    nbytes = cursor.offset - offset
    return GgufArray(cursor.path, identity, kind, letter, count, offset, nbytes)
