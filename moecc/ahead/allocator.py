"""The allocator of a process that compiles: jemalloc, where the machine has it.

A compiler makes and frees many small objects, and a sixth of the time of libtpu goes to glibc's
``malloc`` and ``free`` (docs/compiling.md).
"""

from __future__ import annotations

import os
import sys
from ctypes.util import find_library
from functools import cache

PRELOAD = "LD_PRELOAD"

_RETURNED = "dirty_decay_ms:1000,muzzy_decay_ms:0"
"""Freed memory goes back to the system after a second."""


def allocator_environment() -> dict[str, str]:
    """Return the variables under which a process allocates with jemalloc.

    Without jemalloc there are none, and where something else is preloaded it stays.
    """
    found = None if PRELOAD in os.environ else _jemalloc()
    if found is None:
        return {}
    return {PRELOAD: found, "MALLOC_CONF": os.environ.get("MALLOC_CONF", _RETURNED)}


@cache
def _jemalloc() -> str | None:
    """Return the name of the library, if the linker knows it."""
    return find_library("jemalloc") if sys.platform == "linux" else None
