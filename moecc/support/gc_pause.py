"""Pausing the cyclic garbage collector while much is allocated and little is freed.

A graph of 50,000 nodes, or a header of 100,000 tensors, is millions of objects; each full
collection walks them all and finds nothing, which doubles the cost of a node.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Let no collection run inside; nests, and leaves a collector alone that is off already."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
