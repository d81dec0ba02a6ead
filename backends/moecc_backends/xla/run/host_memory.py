"""What a CPU's memory does between two steps: it is kept, rather than given back and cleared anew.

The temporaries of a step are one large buffer.  The C library takes such a buffer from the system
and gives it back, and the system clears each of its pages when it is touched: a fifth of the
processor time of a step of 5 M parameters, and a sixth with 692 M, whose buffer has 3 GB.
"""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
"""Parameters of ``mallopt``, as glibc's ``malloc.h`` numbers them."""

_NEVER = -1


def keep_freed_memory() -> None:
    """Let this process reuse all buffers that it has freed; without glibc nothing changes.

    Threads take memory from one arena then, since a further one holds no large buffer.  Those of
    jax must not have begun.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER)):
        mallopt(parameter, value)
