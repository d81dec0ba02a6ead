"""The memory of devices: where a program needs more, XLA's error becomes one of the machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax

from moecc.errors import MachineError

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
