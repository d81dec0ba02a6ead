"""Return memory that a compiler has freed to the system while it runs.

glibc keeps freed memory, separately for each thread.  A compiler of many passes frees most of
what it allocates, and its peak is lower if freed memory is returned.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

_SECONDS = 1.0


@contextmanager
def trimmed() -> Iterator[None]:
    """Trim the heap every second, in a thread, if the C library supports it."""
    trim = _trim() if sys.platform == "linux" else None
    if trim is None:
        yield
        return
    done = Event()

    def run() -> None:
        while not done.wait(_SECONDS):
            trim(0)

    thread = Thread(target=run, name="trim", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _trim() -> ctypes._NamedFuncPointer | None:
    # Another C library, such as musl, has no such function.
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
