"""Pause the cyclic garbage collector during large allocations.

A graph of 50,000 nodes, or a header of 100,000 tensors, is millions of objects; each full
collection traverses them all and frees nothing, which doubles the cost of a node.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def gc_paused() -> Iterator[None]:
    """Disable the collector inside; nests, and leaves an already disabled collector alone."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
