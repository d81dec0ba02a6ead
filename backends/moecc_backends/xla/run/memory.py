"""Memory and number types of the process that runs a program."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import jax

from moecc.errors import MachineError
from moecc.types import F64, DType

_EXHAUSTED = "RESOURCE_EXHAUSTED"
"""How XLA's message begins on every platform."""


@contextmanager
def within_memory() -> Iterator[None]:
    """Raise MachineError where XLA could not allocate; may decorate a function, too.

    A program is dispatched before it has run, so results have to be read within, not behind.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        said = str(error)
        if _EXHAUSTED not in said:
            raise
        raise MachineError(
            "the memory of a device is too small for this program",
            found=said.partition(_EXHAUSTED)[2].removeprefix(": ").partition("\n")[0] or None,
            hint="a smaller batch or shorter sequences; in training, more run.micro_batches",
        ) from None


# What a CPU's memory does between two steps: it is kept, rather than given back and cleared anew.
#
# The temporaries of a step are one large buffer. The C library takes such a buffer from the system
# and gives it back, and the system clears each of its pages when it is touched: a fifth of the
# processor time of a step of 5 M parameters, and a sixth with 692 M, whose buffer has 3 GB.

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


# The types that jax has: without its switch it makes every float64 a float32 without a word.


def in_precision(*types: DType | None) -> AbstractContextManager[object]:
    """Return the context in which arrays of `types` are what they say; None stands for none."""
    return jax.enable_x64(F64 in types)
