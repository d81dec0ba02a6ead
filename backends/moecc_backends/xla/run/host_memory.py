"""What a CPU's memory does between two steps: it is kept, rather than given back and cleared anew.

The temporaries of a step are one large buffer.  The C library takes such a buffer from the system
and gives it back, and the system clears each of its pages when it is touched: a fifth of the
processor time of a step of 5 M parameters.
"""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""Parameters of ``mallopt``, as glibc's ``malloc.h`` numbers them."""

_LARGEST = 2**31 - 1
_FROM_SYSTEM = 2**30
"""Buffers from this size on are taken from the system and given back all the same."""


def keep_freed_memory() -> None:
    """Let this process reuse large buffers that it has freed; without glibc nothing changes.

    Threads take memory from one arena then, since a further one holds no large buffer.  Those of
    jax must not have begun.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in (
        (_ARENA_MAX, 1), (_MMAP_THRESHOLD, _FROM_SYSTEM), (_TRIM_THRESHOLD, _LARGEST),
    ):  # fmt: skip
        mallopt(parameter, value)
