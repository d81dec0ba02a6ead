"""The bytes of a GGUF file before its data: keys with values, and the list of tensors.

The format is that of docs/gguf.md of the ggml project, version 3, little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from moecc.errors import InputError
from moecc.formats.gguf.header import DEFAULT_ALIGNMENT, MAGIC, Key, StoredValue, Written
from moecc.formats.gguf.storage import BY_NAME, Storage
from moecc.formats.safetensors import Entry, Shard
from moecc.types import DType

VERSION = 3
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


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
            *(_text(key.name) + _value(key.value) for key in keys),
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


def _value(value: Written | StoredValue) -> bytes:
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
