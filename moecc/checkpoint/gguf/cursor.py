"""Scan the header of a GGUF file, whose length is not stated anywhere.

Every length in the file is a claim.  A claim is compared with the bytes that remain before
anything is read or allocated for it, and data between two values are skipped by offset, so
that memory is bounded by one window whatever a file claims.
"""

from __future__ import annotations

import struct
from pathlib import Path

from moecc.checkpoint.files import read_into
from moecc.errors import InputError, printable

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
        return f"{self.path}, {self._place}"

    def number(self, layout: struct.Struct) -> int | float:
        """Read one number.

        Raises:
          InputError: the file ends before it.
        """
        begin = self._see(layout.size)
        self.offset += layout.size
        found: int | float = layout.unpack_from(self._window, begin)[0]
        return found

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
            found = f"byte 0x{raw[error.start]:02x} at {self.offset - count + error.start:,}"
            raise self.error("a string is not UTF-8", found=found) from None

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
            f"the file ends in the middle of {self._place}",
            expected=f"{count:,} more bytes",
            found=f"{self.size_bytes - self.offset:,} bytes",
            hint="the download may be incomplete; fetch the file again",
        )

    def error(
        self, what: str, *, expected: str | None = None, found: str, hint: str | None = None
    ) -> InputError:
        """Return the error for the part being read."""
        return InputError(what, where=self.where, expected=expected, found=found, hint=hint)

    @property
    def _place(self) -> str:
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
