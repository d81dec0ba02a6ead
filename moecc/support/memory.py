"""Memory for large arrays: aligned, in huge pages where the system has them."""

from __future__ import annotations

import mmap
import threading
from contextlib import suppress
from math import prod

from moecc.support.lazy import np
from moecc.types import Array

ALIGNMENT = 64
"""XLA reads an array that begins at a multiple of this where it is, without a copy."""

_CHUNK = 32 << 20
"""Small arrays share chunks of this size, so that a huge page (2 MiB) is rarely half empty."""

_SMALL = 64 << 10

_lock = threading.Lock()
_chunk: Array | None = None
_used = 0


def empty(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
    """Return an array without values; its memory is given back once it and its neighbours are.

    A system clears memory page by page as it is touched: 2.8 GB in pages of 4 KiB take longer than
    all else that reading a model does.
    """
    global _chunk, _used
    size = prod(shape) * dtype.itemsize
    if size < _SMALL:
        return np.empty(shape, dtype)
    if size > _CHUNK // 2:
        return _mapped(size)[:size].view(dtype).reshape(shape)
    with _lock:
        if _chunk is None or _used + size > _CHUNK:
            _chunk, _used = _mapped(_CHUNK), 0
        memory = _chunk[_used : _used + size]
        _used += -(-size // ALIGNMENT) * ALIGNMENT
    return memory.view(dtype).reshape(shape)


def _mapped(size: int) -> Array:
    """Return bytes of a mapping of their own, which begins with a page."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.empty(size, np.uint8)
    whole_pages = -(-size // (2 << 20)) * (2 << 20)
    mapping = mmap.mmap(-1, whole_pages, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapping, np.uint8)
